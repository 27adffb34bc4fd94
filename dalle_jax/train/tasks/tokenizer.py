"""The stage of a discrete image tokenizer: it learns to reconstruct pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax import tokenizer
from dalle_jax.config import TokenizerConfig, TrainConfig
from dalle_jax.data.images import to_bytes, to_floats
from dalle_jax.data.pipeline import eval_batch, train_batches
from dalle_jax.data.sources import open_source
from dalle_jax.tokenizer import dvae, losses
from dalle_jax.tokenizer.losses import scheduled
from dalle_jax.train.processes import fetch
from dalle_jax.train.tasks.pictures import (
    PICTURES,
    eval_batches,
    grid,
    log_unusable,
)  # fmt: skip

Params = dict[str, Any]
Batch = dict[str, Any]


class TokenizerTask:
    """A discrete image tokenizer learns to reconstruct pictures."""

    best = ("eval_psnr", "max")

    def __init__(self, config: TrainConfig):
        self.config, self.model = config, config.model
        self.frozen: Params = {}
        self.tokens_per_row = self.model.num_codes
        self.row_shapes = {"image": ((self.model.image_size, self.model.image_size, 3), jnp.uint8)}

    def prepare(self, run_dir: Path) -> None:
        self._source = open_source(self.config.data.source, "train", languages=())
        self._eval = open_source(self.config.data.source, "eval", languages=())
        log_unusable(self._source, run_dir)

    def init(self, key: jax.Array) -> Params:
        return tokenizer.init(self.model, key)

    def loss(self, params, frozen, batch, key, step):
        weights = {
            name: scheduled(getattr(self.model, name), step)
            for name in ("tau", "kl_weight", "balance_weight")
        }
        value, metrics = dvae.loss(self.model, params, to_floats(batch["image"]), key, **weights)
        return value, {**metrics, **weights}

    def batches(self, start: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        return train_batches(
            self.config.data,
            self._source,
            start=start,
            image_size=self.model.image_size,
            rows=rows,
        )

    def eval_batches(self) -> list[Batch]:
        return [
            {"image": batch["image"]}
            for batch in eval_batches(self.config, self._eval, image_size=self.model.image_size)
        ]

    def evaluate(self, params, frozen, batch, key):
        images_BHWC = to_floats(batch["image"])
        codes_BN = tokenizer.encode(self.model, params, images_BHWC)
        decoded = tokenizer.decode(self.model, params, codes_BN)
        use, perplexity = losses.codebook_use(codes_BN, self.model.vocab)
        return {
            "eval_psnr": jnp.mean(losses.psnr(images_BHWC, decoded)),
            "eval_mse": jnp.mean(jnp.square(images_BHWC - decoded)),
            "eval_codebook_use": use,
            "eval_perplexity": perplexity,
        }

    def pictures(self, params, frozen, key) -> Image.Image:
        """Pairs of a picture and, right of it, its reconstruction from codes."""
        batch = eval_batch(self.config.data, self._eval, PICTURES, image_size=self.model.image_size)
        decoded = _reconstruct(self.model, params, jnp.asarray(batch["image"]))
        pairs = np.concatenate([batch["image"], to_bytes(fetch(decoded))], axis=2)
        return grid(pairs, 4, None)


def _reconstruct(model: TokenizerConfig, params: Params, image_u8: jax.Array) -> jax.Array:
    both = jax.jit(lambda p, x: tokenizer.decode(model, p, tokenizer.encode(model, p, to_floats(x))))
    return both(params, image_u8)
