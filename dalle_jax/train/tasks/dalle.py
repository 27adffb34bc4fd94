"""The stage of the Transformer: it learns captions and the codes that a frozen tokenizer gives their pictures."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax import autoregressive, text, tokenizer
from dalle_jax.config import TokenizerConfig, TrainConfig, TransformerConfig
from dalle_jax.data.codes import CodesRows
from dalle_jax.data.images import to_bytes, to_floats
from dalle_jax.data.pipeline import eval_batch, open_train_source, train_batches
from dalle_jax.data.sources import open_source
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.train.bucket import local_dir
from dalle_jax.train.processes import fetch
from dalle_jax.train.rundir import load_frozen, load_run, read_config, save_frozen, share
from dalle_jax.train.start import copy_tokenizer
from dalle_jax.train.tasks.captions import make_vocabulary, tell_cut
from dalle_jax.train.tasks.pictures import (
    PICTURES,
    eval_batches,
    grid,
    log_unusable,
)  # fmt: skip

Params = dict[str, Any]
Batch = dict[str, Any]


def check_fits(transformer: TransformerConfig, model: Any, where: Any) -> None:
    """Raises ValueError unless `model`, of the run `where`, is a tokenizer that gives the codes that are wanted."""
    if not isinstance(model, TokenizerConfig):
        raise ValueError(f"tokenizer {where} is a run of stage {model.kind}, want a tokenizer (dvae, vqgan)")
    for name, ours, theirs in (
        ("image_vocab", transformer.image_vocab, model.vocab),
        ("grid", transformer.grid, model.grid),
    ):
        if ours != theirs:
            raise ValueError(
                f"model.{name} is {ours}, but the tokenizer {where} has {theirs}; set them equal"
            )


class DalleTask:
    """The Transformer learns captions and the codes that a frozen tokenizer gives their pictures."""

    best = ("eval_loss", "min")

    def __init__(self, config: TrainConfig):
        self.config, self.model = config, config.model
        self.tokens_per_row = self.model.length
        self.frozen: Params = {}
        begun = [
            local_dir(run) / "tokenizer" / "config.json" for run in (config.run, config.init_from) if run
        ]
        if config.tokenizer is None and not any(file.exists() for file in begun):
            raise ValueError(
                "tokenizer is not set; the stage dalle needs the run directory of a trained tokenizer: pass "
                "--tokenizer runs/NAME"
            )
        if config.tokenizer is not None:  # before the run directory is made
            check_fits(self.model, read_config(config.tokenizer).model, config.tokenizer)

    def prepare(self, run_dir: Path) -> None:
        config, first = self.config, jax.process_index() == 0
        self._source = open_train_source(config.data)
        self._eval = open_source(config.data.source, "eval", languages=config.data.languages)
        log_unusable(self._source, run_dir)
        vocabulary, frozen = run_dir / "text.model", run_dir / "tokenizer"
        if first:
            make_vocabulary(config, self._source, vocabulary, self.model.text_vocab)
        if first and not (frozen / "config.json").exists():
            shutil.rmtree(frozen, ignore_errors=True)  # half-written
            if config.tokenizer is not None or not copy_tokenizer(config, frozen):
                save_frozen(frozen, load_run(config.tokenizer))
        share(run_dir)
        self.text = text.TextTokenizer.load(vocabulary)
        if self.text.size > self.model.text_vocab:
            raise ValueError(
                f"{vocabulary} has {self.text.size} pieces, model.text_vocab is {self.model.text_vocab}; raise it"
            )
        if first:
            tell_cut(self.text, self._source, self.model.text_len)
        self.tokenizer, self.frozen, fingerprint = load_frozen(frozen)
        check_fits(self.model, self.tokenizer, frozen)
        self._check_codes(fingerprint)

    def _check_codes(self, fingerprint: str) -> None:
        made = self._source.info.tokenizer if isinstance(self._source, CodesRows) else fingerprint
        if made != fingerprint:
            raise ValueError(
                f"data.codes {self.config.data.codes} was encoded by tokenizer {made}, this run's tokenizer is "
                f"{fingerprint}; encode again with `dalle-jax encode {self.config.tokenizer} --data`"
            )

    def init(self, key: jax.Array) -> Params:
        return autoregressive.init(self.model, key)

    def _codes(self, frozen: Params, batch: Batch) -> jax.Array:
        if "codes" in batch:
            return batch["codes"]
        return tokenizer.encode(self.tokenizer, frozen, to_floats(batch["image"]))

    def loss(self, params, frozen, batch, key, step):
        return autoregressive.loss(self.model, params, batch["text"], self._codes(frozen, batch), key)

    def batches(self, start: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        return train_batches(
            self.config.data,
            self._source,
            start=start,
            image_size=self.tokenizer.image_size,
            dropout=self.config.text.dropout,
            rows=rows,
            **self._text_options(),
        )

    def _text_options(self) -> dict[str, Any]:
        return {"text": self.text, "text_vocab": self.model.text_vocab, "text_len": self.model.text_len}

    def eval_batches(self) -> list[Batch]:
        batches = eval_batches(
            self.config, self._eval, image_size=self.tokenizer.image_size, **self._text_options()
        )
        return [{"image": batch["image"], "text": batch["text"]} for batch in batches]

    def evaluate(self, params, frozen, batch, key):
        model = dataclasses.replace(self.model, null_rate=0.0)
        codes = self._codes(frozen, batch)
        value, metrics = autoregressive.loss(model, params, batch["text"], codes, key)
        return {"eval_loss": value, **{f"eval_{name}": v for name, v in metrics.items()}}

    def pictures(self, params, frozen, key) -> Image.Image:
        """Samples for captions of the evaluation split, guidance 1 (none), each under its caption."""
        batch = eval_batch(
            self.config.data,
            self._eval,
            PICTURES,
            image_size=self.tokenizer.image_size,
            **self._text_options(),
        )
        seeds = jax.random.bits(key, (len(batch["text"]),))
        codes = generate(self.model, params, jnp.asarray(batch["text"]), row_keys(seeds))
        decoded = jax.jit(tokenizer.decode, static_argnums=0)(self.tokenizer, frozen, codes)
        return grid(to_bytes(fetch(decoded)), 4, batch["caption"])
