"""Captions as the caption-conditional models of LlamaGen read them: cleaned, in T5's vocabulary, with its end piece.

The captions that these models were trained on came from web pages and were rid of what those put into them (Sun et al.
2024, 2406.06525; the rules go back to DeepFloyd IF): links, tags, names of files, numbers of articles, sales talk, and
Chinese characters. The rules below are theirs, in their order, twice over each caption, but mis-decoded text is not
repaired. A vocabulary is a sentencepiece model of the unigram kind, T5's spiece.model.
"""

from __future__ import annotations

import base64
import html
import json
import re
import unicodedata
from typing import Any
from urllib.parse import unquote_plus

_FORMAT = "t5"
_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# Pattern -> what replaces it, one after another, on lower-case text.
_FIRST: tuple[tuple[str, str], ...] = (
    (r"<person>", "person"),  # stands for a name in some data sets
    (rf"\b(?:https?|www):(?:/{{1,3}}|[a-z0-9%])|\b[a-z0-9.-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@)", ""),
    (r"<!--.*?-->|</?[a-z][^<>]*>", ""),
)
_SECOND: tuple[tuple[str, str], ...] = (
    (r"@\w+", ""),
    (r"[\u31c0-\u9fff]+", ""),  # strokes to unified ideographs
    (r"[-֊־᐀᠆‐-―⸗⸚⸺⸻⹀〜〰゠︱︲﹘﹣－]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"(?:\d{1,3}\.){3}\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_LAST: tuple[tuple[str, str], ...] = (
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # numbers of articles
    (r"\b[a-z]+\d+[a-z]+\b", ""),
    (r"\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)


def normalize_t5_caption(caption: str) -> str:
    """The caption without what web pages put into it, in lower case."""
    return _once(_once(caption))


def _once(text: str) -> str:
    text = _replaced(_FIRST, unquote_plus(text).strip().lower())
    text = _replaced(_SECOND, html.unescape(text))
    if len(re.findall(r"[-_]", text)) > 3:  # this-is-my-cat
        text = re.sub(r"[-_]", " ", text)
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text))).strip()
    return _replaced(_LAST, text).strip()


def _replaced(rules: tuple[tuple[str, str], ...], text: str) -> str:
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


class T5Tokenizer:
    """A vocabulary that cleans captions and sets a piece after each. Any number of threads may use one."""

    def __init__(self, pieces: Any, eos_id: int):
        """pieces: the sentencepiece model, with `encode`, `decode`, `size` and `serialized`."""
        if type(eos_id) is not int or not 0 <= eos_id < pieces.vocab_size:
            raise ValueError(f"end {eos_id} is no id of a vocabulary of {pieces.vocab_size} pieces")
        self._pieces, self._end, self.vocab_size = pieces, eos_id, pieces.vocab_size

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Ids of the pieces of a caption and the end piece; none for an empty caption. dropout, seed: the encoder was
        trained on the usual pieces, and is given no others."""
        return [*self._pieces.encode(normalize_t5_caption(caption)), self._end] if caption.strip() else []

    def decode(self, ids: list[int]) -> str:
        return self._pieces.decode([i for i in ids if i != self._end])

    def normalize(self, caption: str) -> str:
        """What decoding the encoding of a caption gives back."""
        return self.decode(self.encode(caption))

    def to_bytes(self) -> bytes:
        """The vocabulary as one file, which `parse` reads."""
        return serialize_t5(self._pieces.to_bytes(), self._end)


def serialize_t5(model: bytes, eos_id: int) -> bytes:
    """A sentencepiece model as a file whose captions are cleaned and end in a piece."""
    return json.dumps({"format": _FORMAT, "end": eos_id, "pieces": base64.b64encode(model).decode()}).encode()


def parse_t5(data: bytes) -> tuple[bytes, int] | None:
    """The model and the end piece that `serialized` was given; None if `data` is of another kind. Raises ValueError."""
    if data[:1] != b"{" or f'"format": "{_FORMAT}"'.encode() not in data[:32]:
        return None
    try:
        about = json.loads(data)
        return base64.b64decode(about["pieces"], validate=True), about["end"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a vocabulary of T5 is broken: {error!r}") from None
