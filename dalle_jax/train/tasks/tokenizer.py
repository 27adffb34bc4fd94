"""The stage of a discrete image tokenizer: it learns to reconstruct pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax.config import TokenizerConfig, TrainConfig
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.loader.pipeline import eval_batch, train_batches
from dalle_jax.data.sources import open_source
from dalle_jax.models import dvae, tokenizer, tokenizer_losses
from dalle_jax.models.tokenizer_losses import schedule_value
from dalle_jax.parallel.processes import gather_to_host
from dalle_jax.train.tasks.images import GRID_IMAGES, eval_batches, labeled_grid, log_bad_records  # fmt: skip
from dalle_jax.typing import Batch, Params


class TokenizerTask:
    """A discrete image tokenizer learns to reconstruct pictures."""

    best = ("eval_psnr", "max")

    def __init__(self, config: TrainConfig, *, on_codes: bool = False):
        self.config, self.model = config, config.model
        self.frozen: Params = {}
        self.tokens_per_row = self.model.num_codes
        self.batch_spec = {"image": ((self.model.image_size, self.model.image_size, 3), jnp.uint8)}

    def prepare(self, run_dir: Path) -> None:
        self._source = open_source(self.config.data.source, "train", languages=())
        self._eval = open_source(self.config.data.source, "eval", languages=())
        log_bad_records(self._source, run_dir)

    def init(self, key: jax.Array) -> Params:
        return tokenizer.init(self.model, key)

    def loss(self, params, frozen, batch, key, step):
        weights = {
            name: schedule_value(getattr(self.model, name), step)
            for name in ("tau", "kl_weight", "code_usage_weight")
        }
        value, metrics = dvae.loss(self.model, params, to_float(batch["image"]), key, **weights)
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
        images_BHWC = to_float(batch["image"])
        codes_BN = tokenizer.encode(self.model, params, images_BHWC)
        decoded = tokenizer.decode(self.model, params, codes_BN)
        use, perplexity = tokenizer_losses.codebook_use(codes_BN, self.model.vocab)
        return {
            "eval_psnr": jnp.mean(tokenizer_losses.psnr(images_BHWC, decoded)),
            "eval_mse": jnp.mean(jnp.square(images_BHWC - decoded)),
            "eval_codebook_use": use,
            "eval_perplexity": perplexity,
        }

    def sample_grid(self, params, frozen, key) -> Image.Image:
        """Pairs of a picture and, right of it, its reconstruction from codes."""
        batch = eval_batch(self.config.data, self._eval, GRID_IMAGES, image_size=self.model.image_size)
        decoded = _reconstruct(self.model, params, jnp.asarray(batch["image"]))
        pairs = np.concatenate([batch["image"], to_uint8(gather_to_host(decoded))], axis=2)
        return labeled_grid(pairs, 4, None)


def _reconstruct(model: TokenizerConfig, params: Params, image_u8: jax.Array) -> jax.Array:
    both = jax.jit(lambda p, x: tokenizer.decode(model, p, tokenizer.encode(model, p, to_float(x))))
    return both(params, image_u8)
