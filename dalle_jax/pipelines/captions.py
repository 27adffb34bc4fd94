"""The token ids of the captions of a pipeline, T text positions."""

from __future__ import annotations

import numpy as np

from dalle_jax.text.tokenizers import TextTokenizer

_MAX_CACHED = 10_000  # captions


class CaptionTokens:
    """Encodes captions, each of them once; the oldest of many captions are forgotten."""

    def __init__(self, text: TextTokenizer, text_vocab: int, text_len: int):
        self._text, self._options = text, {"text_vocab": text_vocab, "text_len": text_len}
        self._cache: dict[str, tuple[np.ndarray, int]] = {}

    def ids(self, caption: str) -> np.ndarray:
        """Return the token ids of a caption, int32 (T,); a long caption is truncated."""
        return self._encode(caption)[0]

    def num_dropped(self, caption: str) -> int:
        """Return the number of tokens that truncation drops."""
        return self._encode(caption)[1]

    def _encode(self, caption: str) -> tuple[np.ndarray, int]:
        if caption not in self._cache:
            if len(self._cache) >= _MAX_CACHED:
                del self._cache[next(iter(self._cache))]
            self._cache[caption] = self._text.encode_counted(caption, **self._options)
        return self._cache[caption]
