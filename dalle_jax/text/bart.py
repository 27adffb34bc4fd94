"""Captions as DALL-E Mini and Mega read them: simplified, in BART's byte-level vocabulary, between `<s>` and `</s>`.

The models were trained on captions of which only plain lower-case English was left (Dayma et al. 2021): the rules below
are theirs in their order, but for what needs tables that are not part of Python. Names of emoji are Unicode's; accents
are taken off, and other scripts dropped, where theirs are spelled in Latin letters; a hashtag keeps its words together.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata

from dalle_jax.text import byte_bpe
from dalle_jax.text.byte_bpe import ByteLevelBPE

_FORMAT = "bart"
_APOSTROPHE, _DOT, _SLASH = "\ue000", "\ue001", "\ue002"  # stand-ins for marks that the rules must not touch

# Pattern -> what replaces it, one after another, on lower-case ASCII text and the stand-ins.
_RULES: tuple[tuple[str, str], ...] = (
    (r"\A\s*\[\d+\]|\[\d+\]\s*\Z", ""),  # references of Wikipedia
    (r"<[^<]+?>", " "),  # tags of HTML
    (r"http\S+", ""),
    (r"(\d),(?=\d{3})", r"\1"),
    (r"(\w)\.(?=\w)", rf"\1{_DOT}"),
    (r"'(?=(?:[stdm]|ll|re|ve)\b)", _APOSTROPHE),
    (r"(\d)/(?=\d)", rf"\1{_SLASH}"),
    (r"(\w)-(?=\w)", r"\1 "),
    (r"([%&/$*])", r" \1 "),
    (r"#(?=\w)", ""),
    (r"[_#\\]", " "),
    (r"['\"`]", ' " '),
    (r"[()\[\].,|:;?!=+~\-/{}]", ","),
    (_DOT, "."),
    (_APOSTROPHE, "'"),
    (_SLASH, "/"),
    (r"(\D)\1{3,}", r"\1"),  # four or more of a kind are one
    (r'(?:\s*"+\s*)+', ' " '),
    (r"(?:\s*,+\s*)+", ", "),
    (r"\s+", " "),
)


def normalize_caption(caption: str) -> str:
    """The caption in plain lower-case English, with a space before it."""
    text = html.unescape(html.unescape(caption))
    named = [
        f":{unicodedata.name(c, '')}:".replace(" ", "_") if unicodedata.category(c) == "So" else c
        for c in text
    ]
    plain = unicodedata.normalize("NFKD", "".join(named)).translate(
        {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
    )
    text = plain.encode("ascii", "ignore").decode().lower()
    for pattern, new in _RULES:
        text = re.sub(pattern, new, text)
    return " " + text.strip().removesuffix(",").removeprefix(",").strip()


class BartTokenizer:
    """A byte-level vocabulary whose captions stand between two pieces. Any number of threads may use one."""

    def __init__(self, bpe: ByteLevelBPE, bos_id: int, eos_id: int, *, normalize_captions: bool):
        """simplify: apply the rules above first."""
        if not all(type(i) is int and 0 <= i < bpe.vocab_size for i in (bos_id, eos_id)):
            raise ValueError(
                f"begin {bos_id} and end {eos_id} are no ids of a vocabulary of {bpe.vocab_size} pieces"
            )
        self._pairs, self._begin, self._end, self._simplify = bpe, bos_id, eos_id, normalize_captions
        self.vocab_size = bpe.vocab_size

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Ids of the pieces of a caption; of an empty one, begin and end. dropout: as `BytePairs.encode` has it."""
        words = normalize_caption(caption) if self._simplify and caption.strip() else caption.rstrip()
        return [self._begin, *self._pairs.encode(words, bpe_dropout=bpe_dropout, seed=seed), self._end]

    def decode(self, ids: list[int]) -> str:
        return self._pairs.decode([i for i in ids if i not in (self._begin, self._end)]).removeprefix(" ")

    def normalize(self, caption: str) -> str:
        """What decoding the encoding of a caption gives back."""
        return self.decode(self.encode(caption))

    def to_bytes(self) -> bytes:
        """The vocabulary as one file, which `parse` reads."""
        about = {"format": _FORMAT, "begin": self._begin, "end": self._end, "simplify": self._simplify}
        return json.dumps({**about, "pairs": json.loads(self._pairs.to_bytes())}, ensure_ascii=False).encode()


def parse_bart(data: bytes) -> BartTokenizer | None:
    """The vocabulary of `BartCaptions.serialized`, or None if `data` is of another kind. Raises ValueError."""
    if data[:1] != b"{" or f'"format": "{_FORMAT}"'.encode() not in data[:32]:
        return None
    try:
        about = json.loads(data)
        pairs = byte_bpe.parse_byte_bpe(json.dumps(about["pairs"]).encode())
        return BartTokenizer(pairs, about["begin"], about["end"], normalize_captions=bool(about["simplify"]))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a vocabulary of BART is broken: {error!r}") from None
