"""Training stage of the diffusion models: a U-Net that denoises images given its conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

from dalle_jax.checkpoint.layout import IMAGE_TOKENIZER_DIR
from dalle_jax.config import DiffusionConfig, TokenizerConfig, TrainConfig
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.sources import open_source
from dalle_jax.models import tokenizer
from dalle_jax.models.diffusion import denoise, loss, sampler, unet
from dalle_jax.parallel.global_arrays import gather_to_host
from dalle_jax.text.tokenizers import TextTokenizer
from dalle_jax.train.task import BatchSpec, MetricDict
from dalle_jax.train.tasks.data_task import DataTask, labeled_grid, log_bad_records
from dalle_jax.train.tasks.prepare import (
    check_tokenizer,
    check_tokenizer_match,
    load_text_tokenizer,
    prepare_image_tokenizer,
    prepare_text_tokenizer,
    warn_truncated,
)
from dalle_jax.typing import Batch, HostBatch, Params

_SAMPLE_STEPS = 25  # of the sampler in sample grids


class DiffusionTask(DataTask):
    """Trains a U-Net with any of its conditions: captions, labels, image tokens, a low-resolution image."""

    best = ("eval_loss", "min")

    def __init__(self, config: TrainConfig):
        assert isinstance(config.model, DiffusionConfig)
        super().__init__(config)
        self.model = model = config.model
        self.text_tokenizer: TextTokenizer | None = None
        self.image_tokenizer: TokenizerConfig | None = None
        self.tokens_per_row = model.sizes[0] ** 2  # positions of the network
        batch_spec: BatchSpec = {"image": ((model.image_size, model.image_size, 3), jnp.uint8)}
        if model.text is not None:
            batch_spec["text"] = ((model.text.text_len,), jnp.int32)
        if model.num_classes:
            batch_spec["label"] = ((), jnp.int32)
        if model.codes is not None:
            batch_spec["codes"] = ((model.codes.grid**2,), jnp.int32)
        self.batch_spec = batch_spec

    def check_prerequisites(self) -> None:
        if (codes := self.model.codes) is not None:
            check_tokenizer(self.config, codes.vocab, codes.grid, "model.codes.{}")

    def prepare(self, run_dir: Path) -> None:
        config, model = self.config, self.model
        languages = config.data.languages if model.text else ()
        self.train_source = open_source(config.data.source, "train", languages=languages)
        self.eval_source = open_source(config.data.source, "eval", languages=languages)
        log_bad_records(self.train_source, run_dir)
        num_classes = len(self.train_source.classes)
        if model.num_classes and num_classes != model.num_classes:
            raise ValueError(
                f"Expected model.num_classes {num_classes}, the classes of the data, got {model.num_classes}. Set them "
                "equal."
            )
        if (text := model.text) is not None:
            path = prepare_text_tokenizer(config, self.train_source, run_dir, text.text_vocab)
            self.text_tokenizer = load_text_tokenizer(path, text.text_vocab, "model.text.text_vocab")
            warn_truncated(self.text_tokenizer, self.train_source, text.text_len)
        if (codes := model.codes) is not None:
            image_tokenizer, self.frozen, _ = prepare_image_tokenizer(config, run_dir)
            self.image_tokenizer = check_tokenizer_match(
                image_tokenizer, run_dir / IMAGE_TOKENIZER_DIR, codes.vocab, codes.grid, "model.codes.{}"
            )
            if self.image_tokenizer.image_size != model.image_size:
                raise ValueError(
                    f"Expected model.image_size {self.image_tokenizer.image_size}, that of the image tokenizer, got "
                    f"{model.image_size}. Set them equal."
                )

    def init(self, key: jax.Array) -> Params:
        return unet.init(self.model, key)

    def row_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "image_size": self.model.image_size,
            "with_labels": self.model.num_classes > 0,
        }
        if (text := self.model.text) is not None:
            options |= {"text": self.text_tokenizer, "text_vocab": text.text_vocab, "text_len": text.text_len}
        return options

    def _conditions(self, frozen: Params, batch: Batch) -> unet.Conditions:
        """Return the conditions of a batch, without the low-resolution image, which `loss` makes itself."""
        label, codes = batch.get("label"), batch.get("codes")
        if label is not None:
            label = jnp.where(label < 0, self.model.num_classes, label)
        if self.image_tokenizer is not None and codes is None:
            codes = tokenizer.encode(self.image_tokenizer, frozen, to_float(batch["image"]))
        return unet.Conditions(batch.get("text"), label, codes)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, MetricDict]:
        conditions = self._conditions(frozen, batch)
        return loss.loss(self.model, params, to_float(batch["image"]), conditions, key)

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> MetricDict:
        """Compute the loss with every condition and without dropout."""
        conditions = self._conditions(frozen, batch)
        value, metrics = loss.loss(self.model, params, to_float(batch["image"]), conditions, key, train=False)
        return {"eval_loss": value, **{f"eval_{name}": v for name, v in metrics.items()}}

    def sample_grid(self, params: Params, frozen: Params, key: jax.Array) -> Image.Image:
        """Return samples for rows of the evaluation split, without guidance, each above its caption if there is one."""
        batch, captions = self.grid_batch()
        keys_B = jax.random.split(key, len(captions))
        samples = gather_to_host(self._sample(params, frozen, batch, keys_B))
        return labeled_grid(to_uint8(samples / 2 + 0.5), captions if self.model.text is not None else None)

    def _sample(self, params: Params, frozen: Params, batch: HostBatch, keys_B: jax.Array) -> jax.Array:
        model = self.model

        @jax.jit
        def sample(params: Params, frozen: Params, batch: Batch, keys_B: jax.Array) -> jax.Array:
            conditions = self._conditions(frozen, batch)
            if model.low_res_size:
                images_BHWC = 2 * to_float(batch["image"]) - 1
                conditions = conditions._replace(low_res=loss.downsample(images_BHWC, model.low_res_size))
            context = denoise.DenoiserContext(
                params, denoise.encode_conditions_cfg(model, params, conditions, use_cfg=False)
            )
            return sampler.sample(
                model.noise,
                denoise.make_denoiser(model),
                context,
                keys_B,
                (model.image_size, model.image_size, 3),
                sampler="dpm++2m",
                num_steps=_SAMPLE_STEPS,
            ).x

        return sample(params, frozen, jax.tree.map(jnp.asarray, batch), keys_B)
