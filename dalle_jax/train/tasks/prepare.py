"""Text and image tokenizers of a run directory: checked, then copied from another run or trained."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from dalle_jax.checkpoint.export import write_run
from dalle_jax.checkpoint.layout import CONFIG_FILE, IMAGE_TOKENIZER_DIR, TEXT_TOKENIZER_FILE
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.params_file import params_fingerprint
from dalle_jax.checkpoint.remote_dir import local_dir
from dalle_jax.checkpoint.run_dir import read_run_config, sync_run_dir
from dalle_jax.config import ModelConfig, TokenizerConfig, TrainConfig
from dalle_jax.data.codes import CodesDataset
from dalle_jax.data.sources import Dataset
from dalle_jax.data.sources.captions import iter_captions
from dalle_jax.text.tokenizers import TextTokenizer, tokenization_statistics, train_text_tokenizer
from dalle_jax.train.initialize import copy_image_tokenizer, copy_text_tokenizer
from dalle_jax.typing import Params


def check_tokenizer(config: TrainConfig, vocab: int, grid: int, fields: str = "model.{}") -> None:
    """Check that a run has an image tokenizer or names one that matches.

    Args:
      config: Configuration of the run.
      vocab: Codebook size that the model reads.
      grid: Rows and columns of image tokens that the model reads.
      fields: Format of the names of the two configuration fields, for messages.

    Raises:
      ValueError: If no tokenizer is named or present, or it does not match.
      FileNotFoundError: If the named tokenizer does not exist.
    """
    runs = [local_dir(run) for run in (config.run, config.init_from) if run]
    copies = [run / IMAGE_TOKENIZER_DIR / CONFIG_FILE for run in runs]
    if config.image_tokenizer is not None:
        try:
            model = read_run_config(config.image_tokenizer).model
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"image_tokenizer: {error} Train the image tokenizer first, or use --image-tokenizer RUN."
            ) from None
        check_tokenizer_match(model, config.image_tokenizer, vocab, grid, fields)
    elif not any(file.exists() for file in copies):
        raise ValueError(
            f"Expected image_tokenizer, the run of a trained image tokenizer, for a model of kind {config.model.kind}, "
            "got none. Use --image-tokenizer RUN, or --init-from RUN to start from a run and its tokenizer."
        )


def check_tokenizer_match(
    model: ModelConfig, where: object, vocab: int, grid: int, fields: str = "model.{}"
) -> TokenizerConfig:
    """Check that a model is an image tokenizer with `vocab` codes and a grid of `grid` x `grid` tokens.

    Args:
      model: Configuration to check.
      where: Its run directory, for messages.
      vocab: Codebook size that the model of this run reads.
      grid: Rows and columns of image tokens that it reads.
      fields: Format of the names of the two configuration fields, for messages.

    Returns:
      `model`.

    Raises:
      ValueError: If it does not match.
    """
    if not isinstance(model, TokenizerConfig):
        raise ValueError(
            f"Expected the run of an image tokenizer (dvae, vqgan), got {where} of stage {model.kind}."
        )
    vocab_field = "image_vocab" if fields == "model.{}" else "vocab"
    for name, expected, actual in ((vocab_field, vocab, model.vocab), ("grid", grid, model.grid)):
        if expected != actual:
            raise ValueError(
                f"Expected {fields.format(name)} {actual}, that of the image tokenizer {where}, got {expected}. Set "
                "them equal."
            )
    return model


def prepare_text_tokenizer(
    config: TrainConfig, source: Dataset | CodesDataset, run_dir: Path, vocab: int
) -> Path:
    """Write the text tokenizer of a run, if it is missing, and return its path; call this on every process.

    It is that of `config.text.tokenizer_path`, else that of the run `config.init_from`, else trained on the captions.

    Args:
      config: Configuration of the run.
      source: Rows with captions.
      run_dir: Directory of the run.
      vocab: Maximum number of tokens of a trained one.
    """
    path = run_dir / TEXT_TOKENIZER_FILE
    if jax.process_index() == 0 and not path.exists():
        if config.text.tokenizer_path is not None:
            TextTokenizer.load(config.text.tokenizer_path).save(path)
        elif not copy_text_tokenizer(config, path):  # the weights of init_from belong to its vocabulary
            captions = iter_captions(source, config.text.num_train_captions)
            case = {"lowercase": config.text.lowercase, "nfkc": config.text.nfkc}
            train_text_tokenizer(captions, path, vocab=vocab, **case)
    sync_run_dir(run_dir)
    return path


def load_text_tokenizer(path: Path, vocab: int, field: str) -> TextTokenizer:
    """Load a text tokenizer.

    Raises:
      ValueError: If it has more than `vocab` tokens; the message names the configuration field `field`.
    """
    tokenizer = TextTokenizer.load(path)
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"Expected {field} of at least {tokenizer.vocab_size}, the tokens of {path}, got {vocab}. Raise it."
        )
    return tokenizer


def warn_truncated(tokenizer: TextTokenizer, source: Dataset | CodesDataset, text_len: int) -> None:
    """Print how many captions of a sample are longer than `text_len` tokens; the first process prints."""
    if jax.process_index() != 0:
        return
    sample = list(iter_captions(source, 2_000))
    count = tokenization_statistics(tokenizer, sample, text_len=text_len)["cut"]
    if count:
        print(
            f"{count} of {len(sample)} captions are longer than the {text_len} tokens of model.text_len and "
            "are truncated",
            file=sys.stderr,
        )


def prepare_image_tokenizer(config: TrainConfig, run_dir: Path) -> tuple[ModelConfig, Params, str]:
    """Copy the image tokenizer into a run directory, if it is missing, and load it; call this on every process.

    The first process prints where the tokenizer is from.

    Args:
      config: Configuration; `image_tokenizer`, else `init_from`, names the run with the tokenizer.
      run_dir: Directory of the run.

    Returns:
      Configuration, parameters and fingerprint of the tokenizer.
    """
    path = run_dir / IMAGE_TOKENIZER_DIR
    missing = not (path / CONFIG_FILE).exists()
    if jax.process_index() == 0:
        source = config.image_tokenizer or f"that of {config.init_from}"
        print(f"image tokenizer: {source if missing else path}", file=sys.stderr)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("prepare")  # all processes check before the first one writes
    # Every process loads the run, though one would do: Orbax counts the calls of each process, and processes with
    # different counts would wait for each other at the next save.
    run = load_run(config.image_tokenizer) if missing and config.image_tokenizer is not None else None
    if missing and jax.process_index() == 0:
        shutil.rmtree(path, ignore_errors=True)  # an incomplete copy
        if run is not None:
            write_run(path, run.config, run.params, run.step)
        else:
            copy_image_tokenizer(config, path)
    sync_run_dir(run_dir)
    run = load_run(path)
    return run.config.model, run.params, params_fingerprint(run.config.model, run.params)
