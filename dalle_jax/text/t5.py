"""Captions of LlamaGen's text-to-image models: cleaned, in T5's vocabulary, with its end piece.

These models were trained on captions from web pages, without links, tags, file names, article numbers, phrases of
shops, and Chinese characters (Sun et al. 2024, 2406.06525; the rules go back to DeepFloyd IF). The rules below are
theirs, in their order, applied twice to each caption, except that mis-decoded text is not repaired. The vocabulary is a
sentencepiece unigram model, T5's spiece.model.
"""

from __future__ import annotations

import base64
import html
import json
import re
import unicodedata
from urllib.parse import unquote_plus

from dalle_jax.text.sentencepiece_model import SentencePieceModel

_FORMAT = "t5"
_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# Pattern and replacement, applied in order to lower-case text.
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
    (r"(?:\d{1,3}\.){3}\d{1,3}", " "),  # IP addresses
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
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # article numbers
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


def _normalize_t5_caption(caption: str) -> str:
    """Return the caption in lower case, without what web pages add to captions."""
    return _normalize_once(_normalize_once(caption))


def _normalize_once(text: str) -> str:
    text = _apply_rules(_FIRST, unquote_plus(text).strip().lower())
    text = _apply_rules(_SECOND, html.unescape(text))
    if len(re.findall(r"[-_]", text)) > 3:  # this-is-my-cat
        text = re.sub(r"[-_]", " ", text)
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text))).strip()
    return _apply_rules(_LAST, text).strip()


def _apply_rules(rules: tuple[tuple[str, str], ...], text: str) -> str:
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


class T5Tokenizer:
    """A sentencepiece vocabulary that cleans captions and ends each with a piece. Any number of threads may use one."""

    def __init__(self, pieces: SentencePieceModel, eos_id: int):
        """Use a sentencepiece model. Raises ValueError if `eos_id` is no id of it."""
        if type(eos_id) is not int or not 0 <= eos_id < pieces.vocab_size:
            raise ValueError(f"Expected an eos_id in [0, {pieces.vocab_size}), got {eos_id}.")
        self._pieces, self._eos_id = pieces, eos_id
        self.vocab_size = self.num_used_ids = pieces.vocab_size

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Return the ids of the pieces of a caption and the end piece; none for an empty caption.

        The encoder was trained without dropout: `bpe_dropout` and `seed` are unused.
        """
        return [*self._pieces.encode(_normalize_t5_caption(caption)), self._eos_id] if caption.strip() else []

    def decode(self, ids: list[int]) -> str:
        """See `Vocabulary.decode`."""
        return self._pieces.decode([i for i in ids if i != self._eos_id])

    def normalize(self, caption: str) -> str:
        """See `Vocabulary.normalize`."""
        return self.decode(self.encode(caption))

    def to_bytes(self) -> bytes:
        """Return the vocabulary as a file that `parse_t5` reads."""
        return serialize_t5(self._pieces.to_bytes(), self._eos_id)


def serialize_t5(model: bytes, eos_id: int) -> bytes:
    """Return the contents of a sentencepiece .model file as a file that `parse_t5` reads."""
    return json.dumps({"format": _FORMAT, "end": eos_id, "pieces": base64.b64encode(model).decode()}).encode()


def parse_t5(data: bytes) -> T5Tokenizer | None:
    """Parse `T5Tokenizer.to_bytes`; None for data of another kind. Raises ValueError for damaged data."""
    if data[:1] != b"{" or f'"format": "{_FORMAT}"'.encode() not in data[:32]:
        return None
    try:
        fields = json.loads(data)
        model, eos_id = base64.b64decode(fields["pieces"], validate=True), fields["end"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Expected a whole vocabulary of T5, got {error!r}.") from None
    return T5Tokenizer(SentencePieceModel(model), eos_id)
