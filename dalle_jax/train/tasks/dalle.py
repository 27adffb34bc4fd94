"""Training stage of the text-to-image Transformers: captions and the codes of a frozen image tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

from dalle_jax.checkpoint.layout import IMAGE_TOKENIZER_DIR
from dalle_jax.config import DalleConfig, TrainConfig, TransformerConfig
from dalle_jax.data.codes import CodesDataset
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.loader.pipeline import open_eval_source, open_train_source
from dalle_jax.models import autoregressive, tokenizer
from dalle_jax.parallel.global_arrays import gather_to_host
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.train.task import MetricDict
from dalle_jax.train.tasks.data_task import DataTask, labeled_grid, log_bad_records
from dalle_jax.train.tasks.prepare import (
    check_tokenizer,
    check_tokenizer_match,
    load_text_tokenizer,
    prepare_image_tokenizer,
    prepare_text_tokenizer,
    warn_truncated,
)
from dalle_jax.typing import Batch, Params


class DalleTask(DataTask):
    """Trains a Transformer, decoder-only or encoder-decoder."""

    best = ("eval_loss", "min")

    def __init__(self, config: TrainConfig):
        assert isinstance(config.model, TransformerConfig)
        super().__init__(config)
        self.model = config.model
        self.tokens_per_row = self.model.seq_len
        self.batch_spec = {
            "text": ((self.model.text_len,), jnp.int32),
            "codes": ((self.model.num_codes,), jnp.int32),
        }

    def check_prerequisites(self) -> None:
        model, init_from = self.model, self.config.init_from
        if isinstance(model, DalleConfig) and model.text_encoder is not None and init_from is None:
            raise ValueError(
                "Expected --init-from with model.text_encoder, which is frozen and pretrained, got none. Use "
                "--init-from RUN with a run that has one (`dalle-jax import llamagen` makes such a run)."
            )
        check_tokenizer(self.config, model.image_vocab, model.grid)

    def prepare(self, run_dir: Path) -> None:
        config, model = self.config, self.model
        self.train_source = open_train_source(config.data)
        self.eval_source = open_eval_source(config.data)
        log_bad_records(self.train_source, run_dir)
        path = prepare_text_tokenizer(config, self.train_source, run_dir, model.text_vocab)
        self.text_tokenizer = load_text_tokenizer(path, model.text_vocab, "model.text_vocab")
        warn_truncated(self.text_tokenizer, self.train_source, model.text_len)
        image_tokenizer, self.frozen, fingerprint = prepare_image_tokenizer(config, run_dir)
        self.image_tokenizer = check_tokenizer_match(
            image_tokenizer, run_dir / IMAGE_TOKENIZER_DIR, model.image_vocab, model.grid
        )
        self._check_codes(fingerprint)

    def _check_codes(self, fingerprint: str) -> None:
        for source in (self.train_source, self.eval_source):
            if isinstance(source, CodesDataset) and source.info.tokenizer != fingerprint:
                raise ValueError(
                    f"Expected data.codes of this run's tokenizer {fingerprint}, got {self.config.data.codes} of "
                    f"tokenizer {source.info.tokenizer}. Encode again with "
                    f"`dalle-jax encode {self.config.image_tokenizer} --data`."
                )

    def init(self, key: jax.Array) -> Params:
        return autoregressive.init(self.model, key)

    def row_options(self) -> dict[str, Any]:
        return {
            "image_size": self.image_tokenizer.image_size,
            "text": self.text_tokenizer,
            "text_vocab": self.model.text_vocab,
            "text_len": self.model.text_len,
        }

    def _codes(self, frozen: Params, batch: Batch) -> jax.Array:
        if "codes" in batch:
            return batch["codes"]
        return tokenizer.encode(self.image_tokenizer, frozen, to_float(batch["image"]))

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, MetricDict]:
        return autoregressive.loss(self.model, params, batch["text"], self._codes(frozen, batch), key)

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> MetricDict:
        """Compute the loss with every caption, whatever `cond_drop_prob` is."""
        model = dataclasses.replace(self.model, cond_drop_prob=0.0)
        codes = self._codes(frozen, batch)
        loss, metrics = autoregressive.loss(model, params, batch["text"], codes, key)
        return {"eval_loss": loss, **{f"eval_{name}": value for name, value in metrics.items()}}

    def sample_grid(self, params: Params, frozen: Params, key: jax.Array) -> Image.Image:
        """Return samples for captions of the evaluation split, without guidance, each above its caption."""
        batch, captions = self.grid_batch()
        seeds = jax.random.bits(key, (len(batch["text"]),))
        codes = generate(self.model, params, jnp.asarray(batch["text"]), row_keys(seeds))
        decoded = jax.jit(tokenizer.decode, static_argnums=0)(self.image_tokenizer, frozen, codes)
        return labeled_grid(to_uint8(gather_to_host(decoded)), captions)
