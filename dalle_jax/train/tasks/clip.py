"""Training stage of CLIP (Radford et al. 2021, 2103.00020): a contrastive loss over the rows of a batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

from dalle_jax.checkpoint.run_dir import read_run_config
from dalle_jax.config import ClipConfig, ModelConfig, TokenizerConfig, TrainConfig
from dalle_jax.data.images import to_float
from dalle_jax.data.sources import open_source
from dalle_jax.models import clip, tokenizer
from dalle_jax.parallel.global_arrays import gather_to_host
from dalle_jax.text.tokenizers import BosEosTokenizer
from dalle_jax.train.task import MetricDict
from dalle_jax.train.tasks.data_task import DataTask, labeled_grid, log_bad_records
from dalle_jax.train.tasks.prepare import prepare_image_tokenizer, prepare_text_tokenizer, warn_truncated
from dalle_jax.typing import Batch, Params


class ClipTask(DataTask):
    """Trains a vision tower and a text tower.

    With an image tokenizer, every second image is replaced by its reconstruction: a CLIP that has been trained on
    original images only cannot rank generated ones.
    """

    best = ("eval_loss", "min")

    def __init__(self, config: TrainConfig):
        assert isinstance(config.model, ClipConfig)
        super().__init__(config)
        self.model = config.model
        self.image_tokenizer: TokenizerConfig | None = None
        self.tokens_per_row = self.model.num_patches + self.model.text_len
        size = self.model.image_size
        self.batch_spec = {
            "image": ((size, size, 3), jnp.uint8),
            "text": ((self.model.text_len,), jnp.int32),
        }

    def check_prerequisites(self) -> None:
        if self.config.image_tokenizer is not None:
            self._check_image_tokenizer(read_run_config(self.config.image_tokenizer).model)

    def _check_image_tokenizer(self, model: ModelConfig) -> TokenizerConfig:
        if not isinstance(model, TokenizerConfig):
            raise ValueError(
                f"Expected the run of an image tokenizer (dvae, vqgan), got {self.config.image_tokenizer} of stage "
                f"{model.kind}. Set image_tokenizer to one."
            )
        if model.image_size != self.model.image_size:
            raise ValueError(
                f"Expected model.image_size {model.image_size}, that of the image tokenizer, got "
                f"{self.model.image_size}. Set them equal."
            )
        return model

    def prepare(self, run_dir: Path) -> None:
        config, model = self.config, self.model
        self.train_source = open_source(config.data.source, "train", languages=config.data.languages)
        self.eval_source = open_source(config.data.source, "eval", languages=config.data.languages)
        log_bad_records(self.train_source, run_dir)
        path = prepare_text_tokenizer(config, self.train_source, run_dir, model.text_vocab - 2)
        self.text_tokenizer = BosEosTokenizer.load(path)
        # A vocabulary that is too large raises here instead of in the first batch.
        self.text_tokenizer.encode("", text_vocab=model.text_vocab, text_len=model.text_len)
        warn_truncated(self.text_tokenizer, self.train_source, model.text_len - 2)
        if config.image_tokenizer is not None:
            image_tokenizer, self.frozen, _ = prepare_image_tokenizer(config, run_dir)
            self.image_tokenizer = self._check_image_tokenizer(image_tokenizer)

    def init(self, key: jax.Array) -> Params:
        return clip.init(self.model, key)

    def row_options(self) -> dict[str, Any]:
        return {
            "image_size": self.model.image_size,
            "text": self.text_tokenizer,
            "text_vocab": self.model.text_vocab,
            "text_len": self.model.text_len,
        }

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, MetricDict]:
        images_BHWC = to_float(batch["image"])
        if self.image_tokenizer is not None and frozen:
            images_BHWC = _half_reconstructed(self.image_tokenizer, frozen, images_BHWC)
        return clip.loss(self.model, params, images_BHWC, batch["text"])

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> MetricDict:
        """Compute the loss among the rows of one evaluation batch, whose number may differ from a training batch."""
        model = dataclasses.replace(self.model, grad_cache_chunks=1)
        loss, metrics = clip.loss(model, params, to_float(batch["image"]), batch["text"])
        accuracies = {f"eval_{name}": metrics[name] for name in ("image_to_text", "text_to_image")}
        return {"eval_loss": loss, **accuracies}

    def sample_grid(self, params: Params, frozen: Params, key: jax.Array) -> Image.Image:
        """Return images of the evaluation split above the caption of the grid that each ranks first, with its cosine
        similarity; `not` precedes a wrong caption."""
        batch, captions = self.grid_batch()

        @jax.jit
        def cosines(params: Params, image_u8: jax.Array, text_BT: jax.Array) -> jax.Array:
            image_BE = clip.encode_image(self.model, params, to_float(image_u8))
            return image_BE @ clip.encode_text(self.model, params, text_BT).T

        cosine_BB = gather_to_host(cosines(params, jnp.asarray(batch["image"]), jnp.asarray(batch["text"])))
        labels = []
        for row, best in enumerate(cosine_BB.argmax(axis=1)):
            prefix = "" if captions[best] == captions[row] else "not: "
            labels.append(f"{prefix}{captions[best]} ({cosine_BB[row, best]:.2f})")
        return labeled_grid(batch["image"], labels)


def _half_reconstructed(model: TokenizerConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Replace the rows 1, 3, 5, ... of an even batch by their reconstructions from codes.

    Args:
      model: Image tokenizer.
      params: Its parameters.
      images_BHWC: float32 in [0, 1], B even.

    Returns:
      Images like `images_BHWC`.
    """
    pairs = images_BHWC.reshape(-1, 2, *images_BHWC.shape[1:])  # neighbors are on one device
    decoded = tokenizer.decode(model, params, tokenizer.encode(model, params, pairs[:, 1]))
    return jnp.stack([pairs[:, 0], decoded], axis=1).reshape(images_BHWC.shape)
