"""Initialization of a run from another run: model configuration, weights, vocabulary and image tokenizer.

`--init-from RUN` starts a new run with the weights of RUN (its best checkpoint, averaged parameters if it has them) and
a fresh optimizer. The model configuration is that of RUN unless flags change it, so the configuration of any
Transformer can fine-tune any other, decoder-only or encoder-decoder. `--data.path PATH` selects the kind of source from
the files at PATH. A run that has a checkpoint resumes from it and ignores `init_from`.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dalle_jax.checkpoint.layout import CONFIG_FILE, IMAGE_TOKENIZER_DIR
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.remote_dir import local_dir
from dalle_jax.checkpoint.run_dir import read_run_config
from dalle_jax.config import TrainConfig
from dalle_jax.data.sources import infer_source
from dalle_jax.files.atomic import atomic_path, write_atomic
from dalle_jax.models.registry import model_spec
from dalle_jax.parallel.sharding import path_name
from dalle_jax.train.state import TrainState, shardings_of


def with_init_model(config: TrainConfig) -> TrainConfig:
    """Return `config` with the model of the run `config.init_from`; unchanged where that is None.

    Raises:
      ValueError: If the run trains another kind of model.
      FileNotFoundError: If the run does not exist.
    """
    if config.init_from is None:
        return config
    model = read_run_config(config.init_from).model
    transformers = all(model_spec(m).transformer is not None for m in (model, config.model))
    if type(model) is not type(config.model) and not transformers:
        raise ValueError(
            f"Expected a run of stage {config.model.kind} in --init-from, got {config.init_from} of stage "
            f"{model.kind}. Use a configuration of the same stage."
        )
    return dataclasses.replace(config, model=model)


def with_data_path(config: TrainConfig, path: str) -> TrainConfig:
    """Return `config` with the data at `path` as its source.

    A source of the same kind keeps its other fields; one of another kind has the defaults of that kind.

    Args:
      config: Configuration of the run.
      path: Folder, tar files, npz file, TFDS directory or name, as for `infer_source`.

    Raises:
      ValueError: If the kind of data is unknown.
      FileNotFoundError: If there is no data.
    """
    source = infer_source(path)
    if type(source) is type(config.data.source):
        source = dataclasses.replace(config.data.source, path=path)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))


def init_from_run(state: TrainState, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return a new state with the parameters of another run.

    Args:
      state: Initial state of this run.
      config: Configuration; `config.init_from` names the other run.
      mesh: Devices of the state.

    Returns:
      `state` with the loaded parameters, which are also its averages.

    Raises:
      ValueError: If a parameter has another shape in the other run.
    """
    if config.init_from is None:
        raise ValueError("Expected init_from, got none. Set it to a run directory.")
    loaded = load_run(config.init_from, config.model.kind, mesh=mesh).params
    subtree = model_spec(config.model).model_subtree
    if subtree is not None:  # a discriminator is trained from scratch
        loaded = {**state.params, subtree: loaded}
    expected, actual = _shapes_by_name(state.params), _shapes_by_name(loaded)
    for name in [*expected, *actual]:
        if expected.get(name) != actual.get(name):
            raise ValueError(
                f"init_from {config.init_from}: Expected parameter {name} of shape {expected.get(name)}, got "
                f"{actual.get(name)}. Keep the fields of `model` as in that run."
            )
    averages = {name: loaded[name] for name in state.ema}
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: x.copy(), tree), out_shardings=shardings_of(state.ema))
    return state._replace(params=loaded, ema=copy(averages))


def copy_text_tokenizer(config: TrainConfig, path: Path) -> bool:
    """Copy the text tokenizer of the run `config.init_from` to `path`; return False if there is none."""
    if config.init_from is None:
        return False
    source = local_dir(config.init_from) / "text_tokenizer.model"
    if not source.is_file():
        return False
    write_atomic(path, source.read_bytes())
    return True


def copy_image_tokenizer(config: TrainConfig, path: Path) -> bool:
    """Copy the frozen image tokenizer of the run `config.init_from` to `path`; return False if there is none."""
    if config.init_from is None:
        return False
    source = local_dir(config.init_from) / IMAGE_TOKENIZER_DIR
    if not (source / CONFIG_FILE).is_file():
        return False
    with atomic_path(path) as copy:
        shutil.copytree(source, copy)
    return True


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
