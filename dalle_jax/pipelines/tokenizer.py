"""Images to codes and back with a trained image tokenizer. R rows, N codes per image, H W pixels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, cast

import jax
import numpy as np

from dalle_jax.checkpoint import params_file
from dalle_jax.checkpoint.load import Run
from dalle_jax.config import TokenizerConfig
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.models import tokenizer as tokenizers
from dalle_jax.pipelines.batching import ProgressFn, map_batches
from dalle_jax.pipelines.protocol import GeneratedImage, ImageRequest
from dalle_jax.typing import Params

IMAGE_BATCH_SIZE = 64  # images encoded, decoded or embedded at once where the caller sets no batch size


@partial(jax.jit, static_argnums=0)
def encode_uint8(cfg: TokenizerConfig, params: Params, image_BHWC: jax.Array) -> jax.Array:
    """Encode images, uint8 (B, H, W, 3), to codes, int32 (B, N)."""
    return tokenizers.encode(cfg, params, to_float(image_BHWC))


_decode = jax.jit(tokenizers.decode, static_argnums=0)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizerPipeline:
    """A trained image tokenizer: a dVAE or a VQGAN."""

    kind: ClassVar[str] = "tokenizer"
    languages: ClassVar[tuple[str, ...]] = ()
    is_class_conditional: ClassVar[bool] = False

    run: Run

    @classmethod
    def from_run(cls, run: Run) -> TokenizerPipeline:
        return cls(run)

    @property
    def config(self) -> TokenizerConfig:
        return cast(TokenizerConfig, self.run.config.model)

    @property
    def tokenizer(self) -> TokenizerPipeline:
        return self

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any parameter (`checkpoint.params_file.fingerprint`)."""
        return params_file.params_fingerprint(self.config, self.run.params)

    def encode(
        self,
        images: np.ndarray,
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """Encode images to codes.

        Args:
            images: uint8 (R, H, W, 3), of the tokenizer's size, R at least 1.
            batch_size: images per call of the network.
            progress: called with the images done and all images.

        Returns:
            int32 (R, N).

        Raises:
            ValueError: another shape or dtype, no images, or `batch_size` is below 1.
        """
        if images.dtype != np.uint8 or not len(images):
            raise ValueError(
                f"Expected images uint8 (rows, height, width, 3), at least one, got {images.dtype} {images.shape}."
            )
        encode = partial(encode_uint8, self.config, self.run.params)
        return map_batches(encode, (images,), min(batch_size, len(images)), progress)

    def decode(
        self,
        codes: np.ndarray,
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """Decode codes to images.

        Args:
            codes: integers (R, N) in [0, vocab), R at least 1.
            batch_size: images per call of the network.
            progress: called with the images done and all images.

        Returns:
            float32 (R, H, W, 3) in [0, 1].

        Raises:
            ValueError: another shape, dtype or code, no rows, or `batch_size` is below 1.
        """
        cfg = self.config
        codes = np.asarray(codes)
        self.check_codes(codes)
        if codes.shape[1] != cfg.num_codes:
            raise ValueError(
                f"Expected {cfg.num_codes} codes per image ({cfg.grid} x {cfg.grid}), got {codes.shape[1]}. Use the "
                "tokenizer that encoded them."
            )
        if codes.min() < 0 or codes.max() >= cfg.vocab:
            row = int(np.flatnonzero(((codes < 0) | (codes >= cfg.vocab)).any(axis=1))[0])
            raise ValueError(
                f"Expected codes in [0, {cfg.vocab}), got codes from {codes[row].min()} to {codes[row].max()} in row "
                f"{row}. Use the tokenizer that encoded them."
            )
        decode = partial(_decode, cfg, self.run.params)
        return map_batches(decode, (codes.astype(np.int32),), min(batch_size, len(codes)), progress)

    def check_codes(self, codes: np.ndarray) -> None:
        """Check that codes are integers (R, columns), R at least 1. Raises ValueError for another shape or dtype."""
        if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer) or not len(codes):
            raise ValueError(
                f"Expected codes of integers (images, {self.config.num_codes}), at least one row, "
                f"got {codes.dtype} {codes.shape}."
            )

    def reconstruct(self, images: np.ndarray, *, batch_size: int = IMAGE_BATCH_SIZE) -> np.ndarray:
        """Encode and decode images: uint8 (R, H, W, 3) to uint8 (R, H, W, 3)."""
        codes = self.encode(images, batch_size=batch_size)
        return to_uint8(self.decode(codes, batch_size=batch_size))

    def num_dropped_tokens(self, prompt: str) -> int:
        """Return 0: a tokenizer reads no prompt."""
        del prompt
        return 0

    def sample(
        self, requests: Iterable[ImageRequest], config: Any = None, **options: Any
    ) -> Iterator[GeneratedImage]:
        """Raise ValueError: an image tokenizer generates no images."""
        path, kind = self.run.path, self.config.kind
        raise ValueError(
            f"Expected a run of a model that generates images, got {path} of stage {kind}, an image tokenizer. Use the "
            f"run of a Transformer trained on it (--image-tokenizer {path}), or `encode` and `decode` with this one."
        )
