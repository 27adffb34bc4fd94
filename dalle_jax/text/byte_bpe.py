"""Public byte-pair vocabularies: CLIP's `bpe_simple_vocab_16e6.txt`, and what Hugging Face writes for CLIP, GPT-2 and
models that split captions as one of them: `vocab.json` with `merges.txt`, or `tokenizer.json`. Standard library only.

A caption is split into words; a word is its UTF-8 bytes, each written as a printable character (GPT-2's
table), which merges join, the earliest merge of the list first (Sennrich et al. 2016, arXiv 1508.07909). A
vocabulary with `</w>` marks ends of words, as CLIP's (Radford et al. 2021, arXiv 2103.00020): captions are then
NFC, lower case, with single spaces. One without keeps the caption as it is, spaces belonging to the next word.
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

_END = "</w>"
_CLIP_MERGES = 49_152 - 256 - 2  # of the list in CLIP's file, the first so many are its vocabulary
_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_FORMAT = "byte pairs"


class ByteLevelBPE:
    """A vocabulary of bytes and merges. Any number of threads may use one."""

    def __init__(self, vocab: dict[str, int], merges: list[str]):
        """vocab: piece -> id. merges: `left right`, earliest first.

        Pieces that no merge makes, as `<|endoftext|>`, keep their ids and are never used. Raises ValueError for ids
        that are not different numbers from 0, for a byte without a piece, and for a merge of or into pieces
        that are not there.
        """
        ids = list(vocab.values())
        if not all(type(i) is int and 0 <= i < 10_000_000 for i in ids) or len(set(ids)) != len(ids):
            raise ValueError("ids of a vocabulary are different integers from 0, as vocab.json has them")
        self._vocab, self._merges, self.vocab_size = vocab, merges, max(ids, default=-1) + 1
        letters = _letters()
        self.ends_words = letters[ord("a")] + _END in vocab
        self._spelled: dict[str, bytes] = {}  # bytes of each piece that captions can have
        for byte, letter in enumerate(letters):
            self._spelled[letter] = bytes([byte])
            if self.ends_words:
                self._spelled[letter + _END] = bytes([byte]) + b" "
        if missing := [piece for piece in self._spelled if piece not in vocab]:
            raise ValueError(
                f"the vocabulary has no piece {missing[0]!r} for a byte ({len(missing)} are missing); want a "
                "byte-level vocabulary, as those of CLIP and GPT-2"
            )
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(merges):
            left, space, right = merge.partition(" ")
            joined = left + right
            if not (left and space and right) or " " in right:
                raise ValueError(f"merge {rank + 1} is {merge!r}; want two pieces with a space between")
            if joined not in vocab or left not in self._spelled or right not in self._spelled:
                raise ValueError(
                    f"merge {rank + 1}, {merge!r}, is of pieces that the vocabulary does not have, or that no "
                    "earlier merge makes; vocab.json and merges.txt belong to one model"
                )
            self._spelled[joined] = self._spelled[left] + self._spelled[right]
            self._ranks.setdefault((left, right), rank)
        self._bytes_of = {vocab[piece]: spelled for piece, spelled in self._spelled.items()}
        self.num_used_ids = max(self._bytes_of) + 1  # ids of captions are below it
        self._letters = letters
        self._usual = functools.lru_cache(maxsize=65_536)(self._split)

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Ids of the pieces of a caption. dropout: probability of skipping a merge (1910.13267)."""
        chance = random.Random(seed) if bpe_dropout > 0 else None
        ids: list[int] = []
        for word in self._words(caption):
            ids += self._usual(word) if chance is None else self._split(word, bpe_dropout, chance)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The caption that ids spell; words apart by a space where the vocabulary marks ends of words."""
        text = b"".join(self._bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")
        return text.removesuffix(" ") if self.ends_words else text

    def normalize(self, caption: str) -> str:
        """What decoding the encoding of a caption gives back."""
        words = self._words(caption)
        return " ".join(words) if self.ends_words else "".join(words)

    def to_bytes(self) -> bytes:
        """The vocabulary as one file, which `parse` reads."""
        about = {"format": _FORMAT, "vocab": self._vocab, "merges": self._merges}
        return json.dumps(about, ensure_ascii=False).encode()

    def _words(self, caption: str) -> list[str]:
        if not self.ends_words:
            return _gpt2_words(caption)
        return _clip_words(" ".join(unicodedata.normalize("NFC", caption).split()).lower())

    def _split(self, word: str, dropout: float = 0.0, chance: random.Random | None = None) -> list[int]:
        pieces = [self._letters[byte] for byte in word.encode()]
        if self.ends_words:
            pieces[-1] += _END
        while len(pieces) > 1:
            pairs = [p for p in itertools.pairwise(pieces) if p in self._ranks]
            if chance is not None:
                pairs = [p for p in pairs if chance.random() >= dropout]
            if not pairs:
                break
            best = min(pairs, key=self._ranks.__getitem__)
            joined, i = [], 0
            while i < len(pieces):
                here = tuple(pieces[i : i + 2]) == best
                joined.append("".join(best) if here else pieces[i])
                i += 2 if here else 1
            pieces = joined
        return [self._vocab[piece] for piece in pieces]


def load_byte_bpe(path: Path) -> ByteLevelBPE | None:
    """The vocabulary at `path`: CLIP's file (gzip or not), vocab.json with merges.txt beside it, tokenizer.json, a
    folder of these, or a file of `BytePairs.serialized`. None for a file that is none of these. Raises OSError for
    files that cannot be read, ValueError for those that are broken or of a kind that is not read here."""
    if path.is_dir():
        there = path / "tokenizer.json"
        path = there if there.is_file() and not (path / "merges.txt").is_file() else path / "vocab.json"
    if path.name == "merges.txt":
        path = path.with_name("vocab.json")
    data = path.read_bytes()
    if path.name != "vocab.json":
        return parse_byte_bpe(data)
    lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
    return ByteLevelBPE(_object(data), _merges(lines))


def parse_byte_bpe(data: bytes) -> ByteLevelBPE | None:
    """The vocabulary that a single file holds, or None if it is of no kind that is read here."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"the gzip file is broken ({error})") from None
    if data[:1] == b"{":
        about = _object(data)
        if isinstance(about.get("model"), dict):
            _check_hugging_face(about)
            about = about["model"]
        elif about.get("format") != _FORMAT:
            raise ValueError(
                "JSON of another kind; name tokenizer.json, or vocab.json with merges.txt beside it"
            )
        vocab, merges = about.get("vocab"), about.get("merges")
        if isinstance(merges, list):  # newer files have pairs
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
    merges = _merges(rest.decode("utf-8").split("\n"))[:_CLIP_MERGES]
    letters = [*_printable().values()]
    pieces = [*letters, *(letter + _END for letter in letters)]
    pieces += [merge.replace(" ", "", 1) for merge in merges]
    return ByteLevelBPE({piece: i for i, piece in enumerate([*pieces, *_SPECIALS])}, merges)


def _check_hugging_face(about: dict) -> None:
    """Raises ValueError unless this tokenizer.json is byte-level and splits captions as GPT-2's or CLIP's does."""
    model = about["model"]

    def refuse(what: str) -> None:
        raise ValueError(
            f"this tokenizer.json {what}; read are byte-level BPE files that split captions as GPT-2 or CLIP does. "
            "Train a vocabulary instead (`dalle-jax text train`)"
        )

    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        refuse(f"is of type {model.get('type')!r}")
    for name in ("ignore_merges", "continuing_subword_prefix", "byte_fallback"):
        if model.get(name):
            refuse(f"sets {name}")
    steps = _steps(about.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if model.get("end_of_word_suffix"):
        if model["end_of_word_suffix"] != _END:
            refuse(f"ends words with {model['end_of_word_suffix']!r}")
        folds = {step.get("type") for step in _steps(about.get("normalizer"), "normalizers")}
        if folds != {"NFC", "Replace", "Lowercase"}:
            refuse("folds captions otherwise than CLIP's")
        pattern = steps[0].get("pattern", {}).get("Regex", "") if kinds == ["Split", "ByteLevel"] else ""
        if not all(part in pattern for part in (*_CONTRACTIONS, "[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+")):
            refuse("splits captions by another pattern than CLIP's")
    elif kinds != ["ByteLevel"] or not steps[0].get("use_regex", True) or about.get("normalizer"):
        refuse("splits or folds captions otherwise than GPT-2's")
    elif steps[0].get("add_prefix_space", True):
        refuse("puts a space before captions (add_prefix_space)")


def _steps(part: dict | None, inside: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, which may be one, a sequence or none."""
    steps = part.get(inside, []) if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    return [step for step in steps if isinstance(step, dict)]


def _object(data: bytes) -> dict:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("want a JSON object of pieces and their ids")
    return found


def _merges(lines: list[str]) -> list[str]:
    lines = [line.rstrip("\r") for line in lines]
    return [line for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version"))]


def _printable() -> dict[int, str]:
    """GPT-2's table in the order of CLIP's ids: a byte -> a character that is no space and no control."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _letters() -> list[str]:
    table = _printable()
    return [table[byte] for byte in range(256)]


def _class(c: str) -> str:
    """L letter, N number, S space, O other: what the patterns of both tokenizers tell apart."""
    if c.isspace():
        return "S"
    kind = unicodedata.category(c)[0]
    return kind if kind in "LN" else "O"


def _run(classes: str, at: int) -> int:
    """Where the run of one class that begins at `at` ends."""
    end = at + 1
    while end < len(classes) and classes[end] == classes[at]:
        end += 1
    return end


def _clip_words(text: str) -> list[str]:
    """Contractions, runs of letters, single numbers, runs of what is neither; spaces between are dropped."""
    classes, words, at = "".join(map(_class, text)), [], 0
    while at < len(text):
        cut = next((c for c in _CONTRACTIONS if text.startswith(c, at)), None)
        end = at + len(cut) if cut else at + 1 if classes[at] == "N" else _run(classes, at)
        if classes[at] != "S":
            words.append(text[at:end])
        at = end
    return words


def _gpt2_words(text: str) -> list[str]:
    """Contractions, and runs of letters, numbers or others with the one space before them; of more spaces
    all but the last are a word."""
    classes, words, at = "".join(map(_class, text)), [], 0
    while at < len(text):
        cut = next((c for c in _CONTRACTIONS if text.startswith(c, at)), None)
        if cut:
            end = at + len(cut)
        elif classes[at] != "S":
            end = _run(classes, at)
        else:
            end = _run(classes, at)
            if end < len(text):
                if end - at > 1:
                    end -= 1
                elif text[at] == " ":
                    end = _run(classes, end)
        words.append(text[at:end])
        at = end
    return words
