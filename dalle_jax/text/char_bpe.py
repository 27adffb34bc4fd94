"""Byte-pair vocabularies over characters, not bytes: Hugging Face's CharBPE (minDALL-E) and YouTokenToMe's plain-text
`bpe.model` (ruDALL-E). Standard library only.

A word is its characters, which merges join, the earliest merge first (Sennrich et al. 2016, arXiv 1508.07909). A
character that the vocabulary does not hold is one unknown piece; of YouTokenToMe, a run of them is. What a word is:

    char-bpe        lower case; blanks part words, marks of punctuation and Chinese characters are words of their own;
                    the last character of a word carries `</w>`
    youtokentome    lower case; blanks part words; a word begins with U+2581
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
    """A vocabulary of characters and merges. Any number of threads may use one."""

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
        """characters: those that words are made of -> id. merges: (left, right, joined), earliest first. size: ids are
        below it. before, after: ids around every caption that is not empty.

        Raises ValueError for an unknown rule, ids outside [0, size), and a merge of a piece that nothing makes.
        """
        if rule not in get_args(WordRule):
            raise ValueError(f"rule is {rule!r}; want one of {', '.join(get_args(WordRule))}")
        if rule == "youtokentome" and _BEGIN not in characters:
            raise ValueError(f"the vocabulary has no {_BEGIN} (U+2581), with which words begin")
        ids = [*characters.values(), unk_id, *before, *after, *(i for merge in merges for i in merge)]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"ids of a vocabulary of {vocab_size} pieces are integers in [0, {vocab_size})")
        self.rule, self.vocab_size = rule, vocab_size
        self._characters, self._merges, self._unknown = characters, merges, unk_id
        self._before, self._after = tuple(before), tuple(after)
        self._spelled = {i: c for c, i in characters.items()}
        self._ranks: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (left, right, joined) in enumerate(merges):
            if left not in self._spelled or right not in self._spelled:
                raise ValueError(f"merge {rank + 1} joins {left} and {right}, of which one is no piece yet")
            self._spelled.setdefault(joined, self._spelled[left] + self._spelled[right])
            self._ranks.setdefault((left, right), (rank, joined))
        self._usual = functools.lru_cache(maxsize=65_536)(self._split)

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Ids of the pieces of a caption, none for one without words. dropout: probability of skipping a merge
        (1910.13267)."""
        chance = random.Random(seed) if bpe_dropout > 0 else None
        ids: list[int] = []
        for word in self._words(caption):
            ids += self._usual(word) if chance is None else self._split(word, bpe_dropout, chance)
        return [*self._before, *ids, *self._after] if ids else []

    def decode(self, ids: list[int]) -> str:
        """The caption that ids spell, without those that spell nothing."""
        around = {self._unknown, *self._before, *self._after}
        text = "".join(self._spelled.get(i, "") for i in ids if i not in around)
        return text.replace(_END if self.rule == "char-bpe" else _BEGIN, " ").strip()

    def normalize(self, caption: str) -> str:
        """What decoding the encoding of a caption gives back."""
        return self.decode(self.encode(caption))

    def to_bytes(self) -> bytes:
        """The vocabulary as one file, which `parse` reads."""
        about = {
            "format": _FORMAT, "rule": self.rule, "size": self.vocab_size, "unknown": self._unknown,
            "before": self._before, "after": self._after, "characters": self._characters, "merges": self._merges,
        }  # fmt: skip
        return json.dumps(about, ensure_ascii=False).encode()

    def _words(self, caption: str) -> list[str]:
        caption = caption.lower()
        if self.rule == "char-bpe":
            return _bert_words(caption)
        return "".join(" " if c in _ASCII_BLANKS or c == _BEGIN else c for c in caption).split(" ")

    def _symbols(self, word: str) -> list[int]:
        known = self._characters.get
        if self.rule == "char-bpe":
            letters = [*word[:-1], word[-1] + _END]
            return [known(c, self._unknown) for c in letters]
        symbols = [known(c, self._unknown) for c in word]
        runs = [s for i, s in enumerate(symbols) if s != self._unknown or i == 0 or symbols[i - 1] != s]
        return [self._characters[_BEGIN], *runs]

    def _split(self, word: str, dropout: float = 0.0, chance: random.Random | None = None) -> list[int]:
        if not word:
            return []
        ids = self._symbols(word)
        while len(ids) > 1:
            found = [
                (self._ranks[pair], i)
                for i, pair in enumerate(itertools.pairwise(ids))
                if pair in self._ranks
            ]
            if chance is not None:
                found = [f for f in found if chance.random() >= dropout]
            if not found:
                break
            (_, joined), at = min(found)
            ids[at : at + 2] = [joined]
        return ids


def char_bpe_from_vocab(vocab: dict[str, int], merges: list[str], *, unk_piece: str = "[UNK]") -> CharBPE:
    """Of Hugging Face's vocab.json and merges.txt. Raises ValueError for files that do not belong together."""
    if unk_piece not in vocab:
        raise ValueError(f"the vocabulary has no piece {unk_piece}")
    if not all(type(i) is int for i in vocab.values()):
        raise ValueError("ids of a vocabulary are integers, as vocab.json has them")
    triples = []
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not all(piece in vocab for piece in (left, right, left + right)):
            raise ValueError(f"merge {i + 1} is {merge!r}, of pieces that the vocabulary does not have")
        triples.append((vocab[left], vocab[right], vocab[left + right]))
    characters = {piece: i for piece, i in vocab.items() if len(piece.removesuffix(_END)) == 1}
    return CharBPE(
        "char-bpe", characters, triples, vocab_size=max(vocab.values()) + 1, unk_id=vocab[unk_piece]
    )


def char_bpe_from_youtokentome(text: str, *, num_bos: int = 1) -> CharBPE:
    """Of a plain-text `bpe.model`: a line `n m`, n lines `code-point id`, m lines `left right joined`, and a line
    `unknown pad begin end`. begins: how often the piece `begin` stands before a caption; `end` follows it once.

    Raises ValueError for a text of another form.
    """
    try:
        rows = [tuple(int(word) for word in line.split()) for line in text.splitlines() if line.strip()]
        (n, m), characters, merges, specials = (
            rows[0],
            rows[1 : 1 + rows[0][0]],
            rows[1 + rows[0][0] : -1],
            rows[-1],
        )
        whole = len(characters) == n and len(merges) == m and len(specials) == 4
        whole = whole and {len(row) for row in characters} == {2} and {len(row) for row in merges} <= {3}
        if not whole:
            raise ValueError("the counts of its first line do not hold")
        table = {chr(point): i for point, i in characters}
    except (ValueError, OverflowError, IndexError) as error:
        raise ValueError(f"not a model of YouTokenToMe: {error}") from None
    unknown, _, begin, end = specials
    if min(unknown, begin, end) < 0:
        raise ValueError(f"the model of YouTokenToMe lacks a piece for unknown, begin or end: {specials}")
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
    """The vocabulary of `CharacterPairs.serialized`, or None if `data` is of another kind. Raises ValueError."""
    if data[:1] != b"{" or f'"{_FORMAT}"'.encode() not in data[:64]:
        return None
    try:
        about = json.loads(data)
        merges = [(left, right, joined) for left, right, joined in about["merges"]]
        ends = {name: tuple(about[name]) for name in ("before", "after")}
        characters, sizes = (
            dict(about["characters"]),
            {"vocab_size": about["size"], "unk_id": about["unknown"]},
        )
        return CharBPE(about["rule"], characters, merges, **sizes, **ends)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"a vocabulary of character pairs is broken: {error!r}") from None


def _bert_words(text: str) -> list[str]:
    """As BERT's tokenizer parts them: blanks part, punctuation and Chinese characters are words of their own."""
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
