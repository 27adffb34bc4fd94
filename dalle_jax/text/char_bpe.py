"""Byte-pair vocabularies over characters instead of bytes: Hugging Face's CharBPE (minDALL-E) and YouTokenToMe's
plain-text `bpe.model` (ruDALL-E). Standard library only.

The characters of a word are merged, the earliest merge first (Sennrich et al. 2016, 1508.07909). A character that the
vocabulary lacks is one unknown piece; in YouTokenToMe a run of them is one. Rules for words, both in lower case:

    char-bpe        words are separated by blanks; punctuation marks and Chinese characters are words; the last
    character
                    of a word carries `</w>`
    youtokentome    words are separated by blanks; a word begins with U+2581
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import unicodedata
from typing import Literal, get_args

_FORMAT = "character pairs"
_END, _BEGIN = "</w>", "\u2581"
_ASCII_BLANKS = " \t\n\v\f\r"  # of YouTokenToMe

WordRule = Literal["char-bpe", "youtokentome"]


class CharBPE:
    """A character-level BPE vocabulary. Any number of threads may use one."""

    def __init__(
        self,
        rule: WordRule,
        characters: dict[str, int],
        merges: list[tuple[int, int, int]],
        *,
        vocab_size: int,
        unk_id: int,
        before: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
    ):
        """Build a vocabulary.

        Args:
          rule: Rule for words.
          characters: Character -> id.
          merges: Ids (left, right, joined), earliest first.
          vocab_size: Ids are below it.
          unk_id: Id of the unknown piece.
          before: Ids before every caption that is not empty.
          after: Ids after every caption that is not empty.

        Raises:
          ValueError: The rule is unknown, an id is out of range, or a merge has a piece that no earlier merge makes.
        """
        if rule not in get_args(WordRule):
            raise ValueError(f"Expected a rule out of {', '.join(get_args(WordRule))}, got {rule!r}.")
        if rule == "youtokentome" and _BEGIN not in characters:
            raise ValueError(f"Expected {_BEGIN} (U+2581), with which words begin, in the vocabulary.")
        ids = [*characters.values(), unk_id, *before, *after, *(i for merge in merges for i in merge)]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"Expected integer ids in [0, {vocab_size}).")
        self._rule, self.vocab_size, self.num_used_ids = rule, vocab_size, vocab_size
        self._characters, self._merges, self._unk_id = characters, merges, unk_id
        self._before, self._after = tuple(before), tuple(after)
        self._spelled = {i: c for c, i in characters.items()}
        self._ranks: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (left, right, joined) in enumerate(merges):
            if left not in self._spelled or right not in self._spelled:
                raise ValueError(
                    f"Expected merge {rank + 1} to join pieces of earlier merges, got {left} and {right}."
                )
            self._spelled.setdefault(joined, self._spelled[left] + self._spelled[right])
            self._ranks.setdefault((left, right), (rank, joined))
        self._split_cached = functools.lru_cache(maxsize=65_536)(self._split)

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """See `Vocabulary.encode`; a caption without words encodes to no ids."""
        rng = random.Random(seed) if bpe_dropout > 0 else None
        ids: list[int] = []
        for word in self._words(caption):
            ids += self._split_cached(word) if rng is None else self._split(word, bpe_dropout, rng)
        return [*self._before, *ids, *self._after] if ids else []

    def decode(self, ids: list[int]) -> str:
        """See `Vocabulary.decode`."""
        special = {self._unk_id, *self._before, *self._after}
        text = "".join(self._spelled.get(i, "") for i in ids if i not in special)
        return text.replace(_END if self._rule == "char-bpe" else _BEGIN, " ").strip()

    def normalize(self, caption: str) -> str:
        """See `Vocabulary.normalize`."""
        return self.decode(self.encode(caption))

    def to_bytes(self) -> bytes:
        """Return the vocabulary as a file that `parse_char_bpe` reads."""
        fields = {
            "format": _FORMAT, "rule": self._rule, "size": self.vocab_size, "unknown": self._unk_id,
            "before": self._before, "after": self._after, "characters": self._characters, "merges": self._merges,
        }  # fmt: skip
        return json.dumps(fields, ensure_ascii=False).encode()

    def _words(self, caption: str) -> list[str]:
        caption = caption.lower()
        if self._rule == "char-bpe":
            return _bert_words(caption)
        return "".join(" " if c in _ASCII_BLANKS or c == _BEGIN else c for c in caption).split(" ")

    def _symbols(self, word: str) -> list[int]:
        id_of = self._characters.get
        if self._rule == "char-bpe":
            letters = [*word[:-1], word[-1] + _END]
            return [id_of(c, self._unk_id) for c in letters]
        symbols = [id_of(c, self._unk_id) for c in word]
        runs = [s for i, s in enumerate(symbols) if s != self._unk_id or i == 0 or symbols[i - 1] != s]
        return [self._characters[_BEGIN], *runs]

    def _split(self, word: str, bpe_dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        if not word:
            return []
        ids = self._symbols(word)
        while len(ids) > 1:
            merges = [
                (self._ranks[pair], i)
                for i, pair in enumerate(itertools.pairwise(ids))
                if pair in self._ranks
            ]
            if rng is not None:
                merges = [merge for merge in merges if rng.random() >= bpe_dropout]
            if not merges:
                break
            (_, joined), i = min(merges)
            ids[i : i + 2] = [joined]
        return ids


def char_bpe_from_vocab(vocab: dict[str, int], merges: list[str], *, unk_piece: str = "[UNK]") -> CharBPE:
    """Build a vocabulary of Hugging Face's CharBPE.

    Args:
      vocab: Contents of vocab.json: piece -> id.
      merges: Lines of merges.txt: `left right`, earliest first.
      unk_piece: The unknown piece.

    Raises:
      ValueError: The files do not belong together.
    """
    if unk_piece not in vocab:
        raise ValueError(f"Expected the piece {unk_piece} in the vocabulary.")
    if not all(type(i) is int for i in vocab.values()):
        raise ValueError("Expected integers as ids of a vocabulary, as in vocab.json.")
    triples = []
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not all(piece in vocab for piece in (left, right, left + right)):
            raise ValueError(f"Expected merge {i + 1} to have pieces of the vocabulary, got {merge!r}.")
        triples.append((vocab[left], vocab[right], vocab[left + right]))
    characters = {piece: i for piece, i in vocab.items() if len(piece.removesuffix(_END)) == 1}
    return CharBPE(
        "char-bpe", characters, triples, vocab_size=max(vocab.values()) + 1, unk_id=vocab[unk_piece]
    )


def char_bpe_from_youtokentome(text: str, *, num_bos: int = 1) -> CharBPE:
    """Build a vocabulary of YouTokenToMe.

    Args:
      text: Contents of a plain-text `bpe.model`: a line `n m`, n lines `code-point id`, m lines `left right joined`,
        and a line `unknown pad begin end`.
      num_bos: Copies of the piece `begin` before a caption; one `end` follows it.

    Raises:
      ValueError: The text has another form.
    """
    try:
        rows = [tuple(int(word) for word in line.split()) for line in text.splitlines() if line.strip()]
        (n, m), specials = rows[0], rows[-1]
        characters, merges = rows[1 : 1 + n], [row for row in rows[1 + n : -1] if len(row) == 3]
        if len(characters) != n or not len(merges) == m == len(rows) - n - 2 or len(specials) != 4:
            raise ValueError("the lines do not match the counts of the first line")
        table = {chr(point): i for point, i in characters}
    except (ValueError, OverflowError, IndexError) as error:
        raise ValueError(f"Expected a model of YouTokenToMe: {error}.") from None
    unknown, _, begin, end = specials
    if min(unknown, begin, end) < 0:
        raise ValueError(
            f"Expected pieces for unknown, begin and end in the model of YouTokenToMe, got {specials}."
        )
    size = 1 + max(*table.values(), *specials, *(joined for _, _, joined in merges))
    return CharBPE(
        "youtokentome",
        table,
        merges,
        vocab_size=size,
        unk_id=unknown,
        before=(begin,) * num_bos,
        after=(end,),
    )


def parse_char_bpe(data: bytes) -> CharBPE | None:
    """Parse `CharBPE.to_bytes`; None for data of another kind. Raises ValueError for damaged data."""
    if data[:1] != b"{" or f'"{_FORMAT}"'.encode() not in data[:64]:
        return None
    try:
        fields = json.loads(data)
        merges = [(left, right, joined) for left, right, joined in fields["merges"]]
        ends = {name: tuple(fields[name]) for name in ("before", "after")}
        characters, sizes = (
            dict(fields["characters"]),
            {"vocab_size": fields["size"], "unk_id": fields["unknown"]},
        )
        return CharBPE(fields["rule"], characters, merges, **sizes, **ends)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"Expected a whole vocabulary of character pairs, got {error!r}.") from None


def _bert_words(text: str) -> list[str]:
    """Split like BERT's tokenizer: at blanks; punctuation marks and Chinese characters are words."""
    words = [""]
    for c in text:
        kind = unicodedata.category(c)
        if c.isspace():
            words.append("")
        elif kind[0] == "C" or c == "\ufffd":
            continue
        elif kind[0] == "P" or (c.isascii() and not c.isalnum()) or _is_chinese(ord(c)):
            words += [c, ""]
        else:
            words[-1] += c
    return [word for word in words if word]


_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def _is_chinese(point: int) -> bool:
    return any(first <= point <= last for first, last in _CHINESE)
