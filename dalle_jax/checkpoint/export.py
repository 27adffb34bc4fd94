"""Run directories that hold a trained model without its training: exported, imported, or frozen inside another run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from dalle_jax.checkpoint.layout import CONFIG_FILE, IMAGE_TOKENIZER_DIR, PARAMS_FILE, TEXT_TOKENIZER_FILE
from dalle_jax.checkpoint.load import Run
from dalle_jax.checkpoint.params_file import write_params
from dalle_jax.config import TrainConfig, to_json
from dalle_jax.files.atomic import atomic_path, write_atomic
from dalle_jax.importers.tensors import ImportedModel
from dalle_jax.typing import Params

_ProgressFn = Callable[[int, int], None]


def write_run(
    path: Path, config: TrainConfig, params: Params, step: int = 0, on_progress: _ProgressFn | None = None
) -> int:
    """Write model.safetensors, then config.json: a directory that has config.json is complete.

    Args:
      path: The run directory; it is made if it is missing.
      config: The configuration.
      params: Nested dicts of arrays or `LazyParam`s.
      step: The training step of the parameters.
      on_progress: Called with the number of parameters written so far and the total.

    Returns:
      The number of parameters.

    Raises:
      OSError: The directory cannot be written.
    """
    count = write_params(path / PARAMS_FILE, params, step, on_progress)
    write_atomic(path / CONFIG_FILE, to_json(config))
    return count


def export_run(run: Run, out: Path) -> int:
    """Write the model of `run` with its text and image tokenizer to the new or empty directory `out`.

    Returns:
      The number of parameters.

    Raises:
      OSError: The directory cannot be written; then `out` is unchanged.
    """
    with atomic_path(out) as directory:
        count = write_run(directory, run.config, run.params, run.step)
        if (run.path / TEXT_TOKENIZER_FILE).is_file():
            shutil.copyfile(run.path / TEXT_TOKENIZER_FILE, directory / TEXT_TOKENIZER_FILE)
        if (run.path / IMAGE_TOKENIZER_DIR).is_dir():
            shutil.copytree(run.path / IMAGE_TOKENIZER_DIR, directory / IMAGE_TOKENIZER_DIR)
    return count


def write_imported_run(
    model: ImportedModel,
    out: Path,
    image_tokenizer: Run | None = None,
    on_progress: _ProgressFn | None = None,
) -> int:
    """Write an imported model to the new or empty directory `out`, its tensors read chunk by chunk.

    Args:
      model: The model, with `LazyParam`s or arrays.
      out: The run directory.
      image_tokenizer: The run of the image tokenizer, for a model whose files have none.
      on_progress: Called with the number of parameters written so far and the total.

    Returns:
      The number of parameters of the model.

    Raises:
      ValueError: It names the tensor that does not fit or is not finite; then `out` is unchanged.
      OSError: The directory cannot be written; then `out` is unchanged.
    """
    with atomic_path(out) as directory:
        count = write_run(directory, TrainConfig(model=model.config), model.params, 0, on_progress)
        frozen = directory / IMAGE_TOKENIZER_DIR
        if model.image_tokenizer is not None:
            write_run(frozen, TrainConfig(model=model.image_tokenizer.config), model.image_tokenizer.params)
        if image_tokenizer is not None:
            write_run(frozen, image_tokenizer.config, image_tokenizer.params, image_tokenizer.step)
        if model.text_tokenizer is not None:
            (directory / TEXT_TOKENIZER_FILE).write_text(model.text_tokenizer, encoding="utf-8")
    return count
