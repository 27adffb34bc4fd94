"""Public byte-level BPE vocabularies: CLIP's `bpe_simple_vocab_16e6.txt`, and Hugging Face's `vocab.json` with
`merges.txt` or `tokenizer.json` for CLIP, GPT-2 and models that split captions like one of them. Standard library only.

A caption is split into words. The UTF-8 bytes of a word, written as printable characters by GPT-2's table, are merged,
the earliest merge of the list first (Sennrich et al. 2016, 1508.07909). A vocabulary with `</w>` marks the ends of
words, like CLIP's (Radford et al. 2021, 2103.00020): captions are then normalized to NFC, lower case and single spaces.
Other vocabularies keep the caption unchanged, and a space belongs to the next word.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import random
import unicodedata
import zlib
from pathlib import Path
from typing import NoReturn

_END = "</w>"
_CLIP_MERGES = 49_152 - 256 - 2  # merges of CLIP's vocabulary; its file lists more
_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_FORMAT = "byte pairs"


class ByteLevelBPE:
    """A byte-level BPE vocabulary. Any number of threads may use one."""

    def __init__(self, vocab: dict[str, int], merges: list[str]):
        """Build a vocabulary.

        Args:
          vocab: Piece -> id. Pieces that no merge makes, such as `<|endoftext|>`, keep their ids and are never used.
          merges: `left right`, earliest first.

        Raises:
          ValueError: Ids are not different integers from 0, a byte has no piece, or a merge has a piece that the
            vocabulary lacks.
        """
        ids = list(vocab.values())
        if not all(type(i) is int and 0 <= i < 10_000_000 for i in ids) or len(set(ids)) != len(ids):
            raise ValueError("Expected different integers from 0 as ids of a vocabulary, as in vocab.json.")
        self._vocab, self._merges, self.vocab_size = vocab, merges, max(ids, default=-1) + 1
        letters = _letters()
        self.ends_words = letters[ord("a")] + _END in vocab
        self._spelled: dict[str, bytes] = {}  # piece that captions can have -> its bytes
        for byte, letter in enumerate(letters):
            self._spelled[letter] = bytes([byte])
            if self.ends_words:
                self._spelled[letter + _END] = bytes([byte]) + b" "
        if missing := [piece for piece in self._spelled if piece not in vocab]:
            raise ValueError(
                "Expected a byte-level vocabulary like those of CLIP and GPT-2, got one without the piece "
                f"{missing[0]!r} of "
                f"a byte ({len(missing)} are missing)."
            )
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(merges):
            left, space, right = merge.partition(" ")
            joined = left + right
            if not (left and space and right) or " " in right:
                raise ValueError(
                    f"Expected two pieces with a space between as merge {rank + 1}, got {merge!r}."
                )
            if joined not in vocab or left not in self._spelled or right not in self._spelled:
                raise ValueError(
                    f"Expected pieces of the vocabulary and of earlier merges as merge {rank + 1}, got {merge!r}. Use "
                    "vocab.json and merges.txt of one model."
                )
            self._spelled[joined] = self._spelled[left] + self._spelled[right]
            self._ranks.setdefault((left, right), rank)
        self._bytes_by_id = {vocab[piece]: spelled for piece, spelled in self._spelled.items()}
        self.num_used_ids = max(self._bytes_by_id) + 1
        self._letters = letters
        self._split_cached = functools.lru_cache(maxsize=65_536)(self._split)

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """See `Vocabulary.encode`."""
        rng = random.Random(seed) if bpe_dropout > 0 else None
        ids: list[int] = []
        for word in self._words(caption):
            ids += self._split_cached(word) if rng is None else self._split(word, bpe_dropout, rng)
        return ids

    def decode(self, ids: list[int]) -> str:
        """See `Vocabulary.decode`; words are separated by a space if the vocabulary marks ends of words."""
        text = b"".join(self._bytes_by_id.get(i, b"") for i in ids).decode("utf-8", "replace")
        return text.removesuffix(" ") if self.ends_words else text

    def normalize(self, caption: str) -> str:
        """See `Vocabulary.normalize`."""
        words = self._words(caption)
        return " ".join(words) if self.ends_words else "".join(words)

    def to_bytes(self) -> bytes:
        """Return the vocabulary as a file that `parse_byte_bpe` reads."""
        fields = {"format": _FORMAT, "vocab": self._vocab, "merges": self._merges}
        return json.dumps(fields, ensure_ascii=False).encode()

    def _words(self, caption: str) -> list[str]:
        if not self.ends_words:
            return _gpt2_words(caption)
        return _clip_words(" ".join(unicodedata.normalize("NFC", caption).split()).lower())

    def _split(self, word: str, bpe_dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        pieces = [self._letters[byte] for byte in word.encode()]
        if self.ends_words:
            pieces[-1] += _END
        while len(pieces) > 1:
            pairs = [p for p in itertools.pairwise(pieces) if p in self._ranks]
            if rng is not None:
                pairs = [p for p in pairs if rng.random() >= bpe_dropout]
            if not pairs:
                break
            best = min(pairs, key=self._ranks.__getitem__)
            joined, i = [], 0
            while i < len(pieces):
                merged = tuple(pieces[i : i + 2]) == best
                joined.append("".join(best) if merged else pieces[i])
                i += 2 if merged else 1
            pieces = joined
        return [self._vocab[piece] for piece in pieces]


def load_byte_bpe(path: Path) -> ByteLevelBPE | None:
    """Read a byte-level vocabulary.

    Args:
      path: CLIP's file (gzip or not), vocab.json with merges.txt beside it, tokenizer.json, a directory of these, or a
        file of `ByteLevelBPE.to_bytes`.

    Returns:
      The vocabulary, or None for a file of another kind.

    Raises:
      OSError: A file cannot be read.
      ValueError: A file is damaged, or a tokenizer.json of a kind that is not supported.
    """
    if path.is_dir():
        single = path / "tokenizer.json"
        path = single if single.is_file() and not (path / "merges.txt").is_file() else path / "vocab.json"
    if path.name == "merges.txt":
        path = path.with_name("vocab.json")
    data = path.read_bytes()
    if path.name != "vocab.json":
        return parse_byte_bpe(data)
    lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
    return ByteLevelBPE(_parse_object(data), _parse_merges(lines))


def parse_byte_bpe(data: bytes) -> ByteLevelBPE | None:
    """Parse a vocabulary of one file (see `load_byte_bpe`); None for data of another kind. Raises ValueError."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"the gzip file is damaged ({error})") from None
    if data[:1] == b"{":
        fields = _parse_object(data)
        if isinstance(fields.get("model"), dict):
            _check_hugging_face(fields)
            fields = fields["model"]
        elif fields.get("format") != _FORMAT:
            raise ValueError(
                "Expected tokenizer.json, or vocab.json with merges.txt beside it, got JSON of another kind"
            )
        vocab, merges = fields.get("vocab"), fields.get("merges")
        if isinstance(merges, list):  # newer files hold pairs
            merges = [
                " ".join(m) if isinstance(m, list) and all(isinstance(x, str) for x in m) else m
                for m in merges
            ]
        if not (
            isinstance(vocab, dict) and isinstance(merges, list) and all(isinstance(m, str) for m in merges)
        ):
            raise ValueError("the file has no vocab or no merges")
        return ByteLevelBPE(vocab, merges)
    first, _, rest = data.partition(b"\n")
    if b"#version" not in first:
        return None
    merges = _parse_merges(rest.decode("utf-8").split("\n"))[:_CLIP_MERGES]
    letters = [*_byte_characters().values()]
    pieces = [*letters, *(letter + _END for letter in letters)]
    pieces += [merge.replace(" ", "", 1) for merge in merges]
    return ByteLevelBPE({piece: i for i, piece in enumerate([*pieces, *_SPECIALS])}, merges)


def _check_hugging_face(tokenizer: dict) -> None:
    """Raise ValueError unless a tokenizer.json is byte-level and splits captions like GPT-2's or CLIP's."""
    model = tokenizer["model"]

    def refuse(what: str) -> NoReturn:
        raise ValueError(
            f"Expected a byte-level BPE that splits captions like GPT-2 or CLIP; this tokenizer.json {what}. Train a "
            "vocabulary instead (`dalle-jax text train`)"
        )

    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        refuse(f"is of type {model.get('type')!r}")
    for name in ("ignore_merges", "continuing_subword_prefix", "byte_fallback"):
        if model.get(name):
            refuse(f"sets {name}")
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if model.get("end_of_word_suffix"):
        if model["end_of_word_suffix"] != _END:
            refuse(f"ends words with {model['end_of_word_suffix']!r}")
        normalizers = {step.get("type") for step in _steps(tokenizer.get("normalizer"), "normalizers")}
        if normalizers != {"NFC", "Replace", "Lowercase"}:
            refuse("normalizes captions unlike CLIP's")
        pattern = steps[0].get("pattern", {}).get("Regex", "") if kinds == ["Split", "ByteLevel"] else ""
        if not all(part in pattern for part in (*_CONTRACTIONS, "[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+")):
            refuse("splits captions by another pattern than CLIP's")
    elif kinds != ["ByteLevel"] or not steps[0].get("use_regex", True) or tokenizer.get("normalizer"):
        refuse("splits or normalizes captions unlike GPT-2's")
    elif steps[0].get("add_prefix_space", True):
        refuse("puts a space before captions (add_prefix_space)")


def _steps(part: dict | None, key: str) -> list[dict]:
    """Return the steps of a normalizer or pre-tokenizer: one, a sequence or none."""
    steps = part.get(key, []) if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    return [step for step in steps if isinstance(step, dict)]


def _parse_object(data: bytes) -> dict:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError("Expected a JSON object of pieces and their ids")
    return fields


def _parse_merges(lines: list[str]) -> list[str]:
    lines = [line.rstrip("\r") for line in lines]
    return [line for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version"))]


def _byte_characters() -> dict[int, str]:
    """Return GPT-2's table in the order of CLIP's ids: byte -> a character that is no space and no control."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _letters() -> list[str]:
    table = _byte_characters()
    return [table[byte] for byte in range(256)]


def _character_class(c: str) -> str:
    """Return L for a letter, N for a number, S for a space, O for others: the classes of the split patterns."""
    if c.isspace():
        return "S"
    kind = unicodedata.category(c)[0]
    return kind if kind in "LN" else "O"


def _run_end(classes: str, start: int) -> int:
    """Return the end of the run of one class that begins at `start`."""
    end = start + 1
    while end < len(classes) and classes[end] == classes[start]:
        end += 1
    return end


def _clip_words(text: str) -> list[str]:
    """Split into contractions, runs of letters, single numbers and runs of others; spaces are dropped."""
    classes, words, start = "".join(map(_character_class, text)), [], 0
    while start < len(text):
        contraction = next((c for c in _CONTRACTIONS if text.startswith(c, start)), None)
        end = (
            start + len(contraction)
            if contraction
            else start + 1
            if classes[start] == "N"
            else _run_end(classes, start)
        )
        if classes[start] != "S":
            words.append(text[start:end])
        start = end
    return words


def _gpt2_words(text: str) -> list[str]:
    """Split into contractions, and runs of letters, numbers or others with one space before them.

    Of several spaces all but the last are a word.
    """
    classes, words, start = "".join(map(_character_class, text)), [], 0
    while start < len(text):
        contraction = next((c for c in _CONTRACTIONS if text.startswith(c, start)), None)
        if contraction:
            end = start + len(contraction)
        elif classes[start] != "S":
            end = _run_end(classes, start)
        else:
            end = _run_end(classes, start)
            if end < len(text):
                if end - start > 1:
                    end -= 1
                elif text[start] == " ":
                    end = _run_end(classes, end)
        words.append(text[start:end])
        start = end
    return words
