"""Base of the stages that train a discrete image tokenizer on the reconstruction of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax.config import TokenizerConfig, TrainConfig
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.sources import open_source
from dalle_jax.models import tokenizer, tokenizer_losses
from dalle_jax.parallel.global_arrays import gather_to_host
from dalle_jax.train.task import MetricDict
from dalle_jax.train.tasks.data_task import DataTask, labeled_grid, log_bad_records
from dalle_jax.typing import Batch, Params


class TokenizerTask(DataTask):
    """Data, evaluation and sample grid of an image tokenizer."""

    best = ("eval_psnr", "max")

    def __init__(self, config: TrainConfig, model: TokenizerConfig):
        super().__init__(config)
        self.tokenizer = model
        self.tokens_per_row = model.num_codes
        self.batch_spec = {"image": ((model.image_size, model.image_size, 3), jnp.uint8)}

    def prepare(self, run_dir: Path) -> None:
        self.train_source = open_source(self.config.data.source, "train", languages=())
        self.eval_source = open_source(self.config.data.source, "eval", languages=())
        log_bad_records(self.train_source, run_dir)

    def init(self, key: jax.Array) -> Params:
        return tokenizer.init(self.tokenizer, key)

    def row_options(self) -> dict[str, Any]:
        return {"image_size": self.tokenizer.image_size}

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> MetricDict:
        images_BHWC = to_float(batch["image"])
        codes_BN = tokenizer.encode(self.tokenizer, params, images_BHWC)
        decoded_BHWC = tokenizer.decode(self.tokenizer, params, codes_BN)
        use, perplexity = tokenizer_losses.codebook_use(codes_BN, self.tokenizer.vocab)
        return {
            "eval_psnr": jnp.mean(tokenizer_losses.psnr(images_BHWC, decoded_BHWC)),
            "eval_mse": jnp.mean(jnp.square(images_BHWC - decoded_BHWC)),
            "eval_codebook_use": use,
            "eval_perplexity": perplexity,
        }

    def sample_grid(self, params: Params, frozen: Params, key: jax.Array) -> Image.Image:
        """Return a grid of pairs: an image and, to its right, its reconstruction from codes."""
        batch, _ = self.grid_batch()

        @jax.jit
        def reconstruct(params: Params, image_u8: jax.Array) -> jax.Array:
            codes = tokenizer.encode(self.tokenizer, params, to_float(image_u8))
            return tokenizer.decode(self.tokenizer, params, codes)

        decoded = gather_to_host(reconstruct(params, jnp.asarray(batch["image"])))
        pairs = np.concatenate([batch["image"], to_uint8(decoded)], axis=2)
        return labeled_grid(pairs, None)
