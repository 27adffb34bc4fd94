"""The stage of the Transformer: it learns captions and the codes that a frozen tokenizer gives their pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax.checkpoint.run_dir import load_frozen
from dalle_jax.config import TrainConfig
from dalle_jax.data.codes import CodesDataset
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.loader.pipeline import eval_batch, open_eval_source, open_train_source, train_batches
from dalle_jax.models import autoregressive, tokenizer
from dalle_jax.parallel.processes import gather_to_host
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.train.tasks.captions import warn_truncated
from dalle_jax.train.tasks.images import GRID_IMAGES, eval_batches, labeled_grid, log_bad_records  # fmt: skip
from dalle_jax.train.tasks.prepare import check_tokenizer, check_tokenizer_match, prepare
from dalle_jax.typing import Batch, Params


class DalleTask:
    """The Transformer learns captions and the codes that a frozen tokenizer gives their pictures."""

    best = ("eval_loss", "min")

    def __init__(self, config: TrainConfig, *, on_codes: bool = False):
        self.config, self.model = config, config.model
        self.tokens_per_row = self.model.seq_len
        self.frozen: Params = {}
        self.batch_spec = {
            "text": ((self.model.text_len,), jnp.int32),
            "codes": ((self.model.num_codes,), jnp.int32),
        }
        if not on_codes:  # before the run directory is made
            if getattr(self.model, "text_encoder", None) is not None and config.init_from is None:
                raise ValueError(
                    "model.text_encoder is frozen, so it must be trained already: begin from a run that has one "
                    "(--init-from RUN; `dalle-jax import llamagen` makes such a run)"
                )
            check_tokenizer(config, self.model.image_vocab, self.model.grid)

    def prepare(self, run_dir: Path) -> None:
        config = self.config
        self._source = open_train_source(config.data)
        self._eval = open_eval_source(config.data)
        log_bad_records(self._source, run_dir)
        self.text = prepare(config, self._source, run_dir, vocab=self.model.text_vocab, tokenizer=True)
        if jax.process_index() == 0:
            warn_truncated(self.text, self._source, self.model.text_len)
        self.tokenizer, self.frozen, fingerprint = load_frozen(run_dir / "tokenizer")
        check_tokenizer_match(self.tokenizer, run_dir / "tokenizer", self.model.image_vocab, self.model.grid)
        self._check_codes(fingerprint)

    def _check_codes(self, fingerprint: str) -> None:
        for rows in (self._source, self._eval):
            made = rows.info.tokenizer if isinstance(rows, CodesDataset) else fingerprint
            if made != fingerprint:
                raise ValueError(
                    f"data.codes {self.config.data.codes} was encoded by tokenizer {made}, this run's tokenizer is "
                    f"{fingerprint}; encode again with `dalle-jax encode {self.config.image_tokenizer} --data`"
                )

    def init(self, key: jax.Array) -> Params:
        return autoregressive.init(self.model, key)

    def _codes(self, frozen: Params, batch: Batch) -> jax.Array:
        if "codes" in batch:
            return batch["codes"]
        return tokenizer.encode(self.tokenizer, frozen, to_float(batch["image"]))

    def loss(self, params, frozen, batch, key, step):
        return autoregressive.loss(self.model, params, batch["text"], self._codes(frozen, batch), key)

    def batches(self, start: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        return train_batches(
            self.config.data,
            self._source,
            start=start,
            image_size=self.tokenizer.image_size,
            bpe_dropout=self.config.text.bpe_dropout,
            rows=rows,
            **self._text_options(),
        )

    def _text_options(self) -> dict[str, Any]:
        return {"text": self.text, "text_vocab": self.model.text_vocab, "text_len": self.model.text_len}

    def eval_batches(self) -> list[Batch]:
        batches = eval_batches(
            self.config, self._eval, image_size=self.tokenizer.image_size, **self._text_options()
        )
        return [{name: batch[name] for name in batch.keys() - {"caption"}} for batch in batches]

    def evaluate(self, params, frozen, batch, key):
        model = dataclasses.replace(self.model, cond_drop_prob=0.0)
        codes = self._codes(frozen, batch)
        value, metrics = autoregressive.loss(model, params, batch["text"], codes, key)
        return {"eval_loss": value, **{f"eval_{name}": v for name, v in metrics.items()}}

    def sample_grid(self, params, frozen, key) -> Image.Image:
        """Samples for captions of the evaluation split, guidance 1 (none), each under its caption."""
        batch = eval_batch(
            self.config.data,
            self._eval,
            GRID_IMAGES,
            image_size=self.tokenizer.image_size,
            **self._text_options(),
        )
        seeds = jax.random.bits(key, (len(batch["text"]),))
        codes = generate(self.model, params, jnp.asarray(batch["text"]), row_keys(seeds))
        decoded = jax.jit(tokenizer.decode, static_argnums=0)(self.tokenizer, frozen, codes)
        return labeled_grid(to_uint8(gather_to_host(decoded)), 4, batch["caption"])
