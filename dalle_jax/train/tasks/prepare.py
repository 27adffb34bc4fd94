"""What a stage takes from elsewhere, put into its run directory: a vocabulary, a frozen tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from dalle_jax.checkpoint.remote_dir import local_dir
from dalle_jax.checkpoint.run_dir import load_run, read_config, save_frozen, sync_run_dir
from dalle_jax.config import TokenizerConfig, TrainConfig
from dalle_jax.data.sources import Dataset
from dalle_jax.text import tokenizers
from dalle_jax.train.initialize import copy_tokenizer
from dalle_jax.train.tasks.captions import make_text_tokenizer


def check_tokenizer(config: TrainConfig, vocab: int, grid: int, fields: str = "model.{}") -> None:
    """Before the run directory is made: is there a tokenizer, and does it fit?

    Raises ValueError if none is named or there, or what `check_tokenizer_match` raises.
    """
    begun = [local_dir(run) / "tokenizer" / "config.json" for run in (config.run, config.init_from) if run]
    if config.image_tokenizer is None and not any(file.exists() for file in begun):
        raise ValueError(
            f"tokenizer is not set; the stage {config.model.kind} needs the run directory of a trained tokenizer: "
            "pass --tokenizer runs/NAME, or --init-from RUN to begin with a run and its tokenizer"
        )
    if config.image_tokenizer is not None:
        try:
            model = read_config(config.image_tokenizer).model
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--tokenizer: {error}; train the tokenizer first") from None
        check_tokenizer_match(model, config.image_tokenizer, vocab, grid, fields)


def check_tokenizer_match(model: Any, where: Any, vocab: int, grid: int, fields: str = "model.{}") -> None:
    """Raises ValueError for a model that is no tokenizer of `vocab` codes in a raster of `grid` x `grid`."""
    if not isinstance(model, TokenizerConfig):
        raise ValueError(f"tokenizer {where} is a run of stage {model.kind}, want a tokenizer (dvae, vqgan)")
    vocab_field = "image_vocab" if fields == "model.{}" else "vocab"
    for name, ours, theirs in ((vocab_field, vocab, model.vocab), ("grid", grid, model.grid)):
        if ours != theirs:
            raise ValueError(
                f"{fields.format(name)} is {ours}, but the tokenizer {where} has {theirs}; set them equal"
            )


def prepare(
    config: TrainConfig,
    source: Dataset,
    run_dir: Path,
    *,
    vocab: int | None,
    tokenizer: bool,
    field: str = "model.text_vocab",
) -> tokenizers.TextTokenizer | None:
    """Writes `text_tokenizer.model` (with a vocab, its most pieces) and `tokenizer/` as far as they are wanted and missing.

    field: what sets `vocab`, for messages. Returns the vocabulary, or None. Raises ValueError for a vocabulary that
    is larger than `vocab`.
    """
    vocabulary, frozen = run_dir / "text_tokenizer.model", run_dir / "tokenizer"
    missing = tokenizer and not (frozen / "config.json").exists()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("prepare")  # all have looked before the first one writes
    # All read, though one would do: Orbax counts what each process does, and those that have not done the same wait
    # for each other at the next save.
    run = load_run(config.image_tokenizer) if missing and config.image_tokenizer is not None else None
    if jax.process_index() == 0:
        if vocab is not None:
            make_text_tokenizer(config, source, vocabulary, vocab)
        if missing:
            shutil.rmtree(frozen, ignore_errors=True)  # half-written
            if run is not None:
                save_frozen(frozen, run)
            else:
                copy_tokenizer(config, frozen)
    sync_run_dir(run_dir)
    if vocab is None:
        return None
    found = tokenizers.TextTokenizer.load(vocabulary)
    if found.vocab_size > vocab:
        raise ValueError(f"{vocabulary} has {found.vocab_size} pieces, {field} is {vocab}; raise it")
    return found
