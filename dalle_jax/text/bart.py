"""Captions of DALL-E Mini and Mega: normalized, in BART's byte-level vocabulary, between `<s>` and `</s>`.

The models were trained on captions reduced to plain lower-case English (Dayma et al. 2021). The rules below are theirs
in their order, except for those that need tables outside Python: emoji get Unicode's names; accents are removed and
other scripts dropped, where the original spells them in Latin letters; the words of a hashtag are not split.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata

from dalle_jax.text.byte_bpe import ByteLevelBPE

_FORMAT = "bart"
_APOSTROPHE, _DOT, _SLASH = "\ue000", "\ue001", "\ue002"  # stand for marks that later rules must not change

# Pattern and replacement, applied in order to lower-case ASCII text with these marks.
_RULES: tuple[tuple[str, str], ...] = (
    (r"\A\s*\[\d+\]|\[\d+\]\s*\Z", ""),  # Wikipedia references
    (r"<[^<]+?>", " "),  # HTML tags
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
    (r"(\D)\1{3,}", r"\1"),  # four or more equal characters become one
    (r'(?:\s*"+\s*)+', ' " '),
    (r"(?:\s*,+\s*)+", ", "),
    (r"\s+", " "),
)


def normalize_bart_caption(caption: str) -> str:
    """Return the caption in plain lower-case English, with a space before it."""
    text = html.unescape(html.unescape(caption))
    characters = [
        f":{unicodedata.name(c, '')}:".replace(" ", "_") if unicodedata.category(c) == "So" else c
        for c in text
    ]
    plain = unicodedata.normalize("NFKD", "".join(characters)).translate(
        {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
    )
    text = plain.encode("ascii", "ignore").decode().lower()
    for pattern, new in _RULES:
        text = re.sub(pattern, new, text)
    return " " + text.strip().removesuffix(",").removeprefix(",").strip()


class BartTokenizer:
    """A byte-level vocabulary with a piece before and after each caption. Any number of threads may use one."""

    def __init__(self, bpe: ByteLevelBPE, bos_id: int, eos_id: int, *, normalize_captions: bool):
        """Use a byte-level vocabulary.

        Args:
          bpe: The vocabulary.
          bos_id: Piece before a caption.
          eos_id: Piece after a caption.
          normalize_captions: Apply `normalize_caption` first.

        Raises:
          ValueError: `bos_id` or `eos_id` is no id of the vocabulary.
        """
        if not all(type(i) is int and 0 <= i < bpe.vocab_size for i in (bos_id, eos_id)):
            raise ValueError(
                f"Expected bos_id and eos_id in [0, {bpe.vocab_size}), got {bos_id} and {eos_id}."
            )
        self._bpe, self._bos_id, self._eos_id, self._normalize_captions = (
            bpe,
            bos_id,
            eos_id,
            normalize_captions,
        )
        self.vocab_size = self.num_used_ids = bpe.vocab_size

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """See `Vocabulary.encode`; an empty caption encodes to `bos_id` and `eos_id`."""
        words = (
            normalize_bart_caption(caption)
            if self._normalize_captions and caption.strip()
            else caption.rstrip()
        )
        return [self._bos_id, *self._bpe.encode(words, bpe_dropout=bpe_dropout, seed=seed), self._eos_id]

    def decode(self, ids: list[int]) -> str:
        """See `Vocabulary.decode`."""
        return self._bpe.decode([i for i in ids if i not in (self._bos_id, self._eos_id)]).removeprefix(" ")

    def normalize(self, caption: str) -> str:
        """See `Vocabulary.normalize`."""
        return self.decode(self.encode(caption))

    def to_bytes(self) -> bytes:
        """Return the vocabulary as a file that `parse_bart` reads."""
        fields = {
            "format": _FORMAT, "begin": self._bos_id, "end": self._eos_id, "simplify": self._normalize_captions,
            "pairs": json.loads(self._bpe.to_bytes()),
        }  # fmt: skip
        return json.dumps(fields, ensure_ascii=False).encode()


def parse_bart(data: bytes) -> BartTokenizer | None:
    """Parse `BartTokenizer.to_bytes`; None for data of another kind. Raises ValueError for damaged data."""
    if data[:1] != b"{" or f'"format": "{_FORMAT}"'.encode() not in data[:32]:
        return None
    try:
        fields = json.loads(data)
        bpe = ByteLevelBPE(fields["pairs"]["vocab"], fields["pairs"]["merges"])
        return BartTokenizer(bpe, fields["begin"], fields["end"], normalize_captions=bool(fields["simplify"]))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"Expected a whole vocabulary of BART, got {error!r}.") from None
