"""The stage of diffusion: a U-Net learns to see the picture behind the noise, given its conditions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax.checkpoint.run_dir import load_frozen
from dalle_jax.config import TrainConfig
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.loader.pipeline import eval_batch, train_batches
from dalle_jax.data.sources import open_source
from dalle_jax.models import tokenizer
from dalle_jax.models.diffusion import denoise, loss, sampler, unet
from dalle_jax.parallel.processes import gather_to_host
from dalle_jax.train.tasks.captions import warn_truncated
from dalle_jax.train.tasks.images import GRID_IMAGES, eval_batches, labeled_grid, log_bad_records  # fmt: skip
from dalle_jax.train.tasks.prepare import check_tokenizer, check_tokenizer_match, prepare
from dalle_jax.typing import Batch, Params

_STEPS = 25  # of the sampler, in pictures drawn while training


class DiffusionTask:
    """A U-Net of pixels with any of its conditions: captions, labels, image tokens, a small picture."""

    best = ("eval_loss", "min")

    def __init__(self, config: TrainConfig, *, on_codes: bool = False):
        self.config, self.model = config, config.model
        self.frozen: Params = {}
        self.tokens_per_row = self.model.sizes[0] ** 2  # places of the network
        model, size = self.model, self.model.image_size
        self.batch_spec = {"image": ((size, size, 3), jnp.uint8)}
        if model.text is not None:
            self.batch_spec["text"] = ((model.text.text_len,), jnp.int32)
        if model.num_classes:
            self.batch_spec["label"] = ((), jnp.int32)
        if codes := model.codes:
            self.batch_spec["codes"] = ((codes.grid**2,), jnp.int32)
            if not on_codes:
                check_tokenizer(config, codes.vocab, codes.grid, "model.codes.{}")

    def prepare(self, run_dir: Path) -> None:
        config, model = self.config, self.model
        languages = config.data.languages if model.text else ()
        self._source = open_source(config.data.source, "train", languages=languages)
        self._eval = open_source(config.data.source, "eval", languages=languages)
        log_bad_records(self._source, run_dir)
        if model.num_classes and len(self._source.classes) != model.num_classes:
            raise ValueError(
                f"model.classes is {model.num_classes}, but the data has {len(self._source.classes)}; set them equal"
            )
        vocab = None if model.text is None else model.text.text_vocab
        self.text = prepare(
            config,
            self._source,
            run_dir,
            vocab=vocab,
            tokenizer=model.codes is not None,
            field="model.text.vocab",
        )
        if self.text is not None and jax.process_index() == 0:
            warn_truncated(self.text, self._source, model.text.text_len)
        if model.codes is not None:
            self.tokenizer, self.frozen, _ = load_frozen(run_dir / "tokenizer")
            check_tokenizer_match(
                self.tokenizer, run_dir / "tokenizer", model.codes.vocab, model.codes.grid, "model.codes.{}"
            )
            if self.tokenizer.image_size != model.image_size:
                raise ValueError(
                    f"model.image_size is {model.image_size}, the tokenizer's is {self.tokenizer.image_size}: make it "
                    "that"
                )

    def init(self, key: jax.Array) -> Params:
        return unet.init(self.model, key)

    def _given(self, frozen: Params, batch: Batch) -> unet.Conditions:
        """What a batch says of its pictures; the small picture is the loss's to make."""
        label, codes = batch.get("label"), batch.get("codes")
        if label is not None:
            label = jnp.where(label < 0, self.model.num_classes, label)
        if self.model.codes is not None and codes is None:
            codes = tokenizer.encode(self.tokenizer, frozen, to_float(batch["image"]))
        return unet.Conditions(batch.get("text"), label, codes)

    def loss(self, params, frozen, batch, key, step):
        given = self._given(frozen, batch)
        return loss.loss(self.model, params, to_float(batch["image"]), given, key)

    def _row_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "image_size": self.model.image_size,
            "with_labels": self.model.num_classes > 0,
        }
        if self.text is not None:
            text = self.model.text
            options |= {"text": self.text, "text_vocab": text.text_vocab, "text_len": text.text_len}
        return options

    def batches(self, start: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        return train_batches(
            self.config.data,
            self._source,
            start=start,
            bpe_dropout=self.config.text.bpe_dropout,
            rows=rows,
            **self._row_options(),
        )

    def eval_batches(self) -> list[Batch]:
        batches = eval_batches(self.config, self._eval, **self._row_options())
        return [{name: rows for name, rows in batch.items() if name != "caption"} for batch in batches]

    def evaluate(self, params, frozen, batch, key):
        """Every row keeps its caption; no dropout."""
        given = self._given(frozen, batch)
        value, metrics = loss.loss(self.model, params, to_float(batch["image"]), given, key, train=False)
        return {"eval_loss": value, **{f"eval_{name}": v for name, v in metrics.items()}}

    def sample_grid(self, params, frozen, key) -> Image.Image:
        """Samples for rows of the evaluation split, no guidance, each under its caption if captions are read."""
        batch = eval_batch(self.config.data, self._eval, GRID_IMAGES, **self._row_options())
        captions = batch.pop("caption")

        @jax.jit
        def draw(params, frozen, batch, keys_B):
            model, given = self.model, self._given(frozen, batch)
            if model.low_res_size:
                given = given._replace(
                    low_res=loss.downsample(2 * to_float(batch["image"]) - 1, model.low_res_size)
                )
            context = denoise.DenoiserContext(
                params, denoise.encode_conditions_cfg(model, params, given, guided=False)
            )
            shape = (model.image_size, model.image_size, 3)
            how = {"sampler": "dpm++2m", "num_steps": _STEPS}
            return sampler.sample(model.noise, denoise.make_denoiser(model), context, keys_B, shape, **how).x

        keys_B = jax.random.split(key, len(captions))
        drawn = draw(params, frozen, jax.tree.map(jnp.asarray, batch), keys_B)
        return labeled_grid(
            to_uint8(gather_to_host(drawn) / 2 + 0.5), 4, captions if self.text is not None else None
        )
