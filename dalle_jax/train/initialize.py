"""How a run begins from another: the weights of a trained run, its model, vocabulary and tokenizer.

`--init-from RUN` begins a new run from the weights of RUN (its best checkpoint, averaged if it has averages)
with fresh optimizer state; the model is that of RUN where flags do not change it. So a configuration of any
Transformer serves for every other, one stream or encoder and decoder. `--data.path PATH` reads what is at PATH,
whatever kind of data that is. A run that has a checkpoint of its own goes on from that.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from dalle_jax.checkpoint.remote_dir import local_dir
from dalle_jax.checkpoint.run_dir import load_run, read_config
from dalle_jax.config import TrainConfig
from dalle_jax.data.sources import infer_source
from dalle_jax.files.atomic import write_atomic
from dalle_jax.models.registry import model_spec
from dalle_jax.parallel.sharding import path_name
from dalle_jax.train.state import TrainState


def apply_flags(config: TrainConfig, argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """`config` with the model of `--init-from` and the source of `--data.path`, and the flags that are left.

    Raises what `read_config` and `infer_source` raise; ValueError for a run of another stage.
    """
    path, left = _take(list(argv), ("--data.path",), keep=False)
    if path is not None:
        source = infer_source(path)
        if type(source) is type(config.data.source):
            source = dataclasses.replace(config.data.source, path=path)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    begun, left = _take(left, ("--init-from", "--init_from"), keep=True)
    begun = begun or config.init_from
    if begun is not None:
        model = read_config(begun).model
        both = all(model_spec(m).transformer is not None for m in (model, config.model))
        if type(model) is not type(config.model) and not both:
            raise ValueError(
                f"--init-from {begun} is a run of stage {model.kind}, this configuration of stage "
                f"{config.model.kind}; use a configuration of the same stage"
            )
        config = dataclasses.replace(config, model=model)
    return config, left


def _take(argv: list[str], names: tuple[str, ...], *, keep: bool) -> tuple[str | None, list[str]]:
    """The last value of a flag, as `--name value` or `--name=value`; the other words, or all with `keep`."""
    value, left, words = None, [], iter(argv)
    for word in words:
        name, equals, tail = word.partition("=")
        if name not in names:
            left.append(word)
            continue
        value = tail if equals else next(words, None)
        if value is None:
            raise ValueError(f"{name} wants a value")
        left += [name, value] if keep else []
    return value, left


def init_from_run(state: TrainState, config: TrainConfig, mesh: Mesh) -> TrainState:
    """A new state with the weights of `config.init_from` for its parameters and averages.

    Raises ValueError naming the parameter whose shape differs; what `load_run` raises.
    """
    loaded = load_run(config.init_from, config.model.kind, mesh=mesh).params
    part = model_spec(config.model).model_subtree
    if part is not None:  # what trains beside the model begins anew
        loaded = {**state.params, part: loaded}
    want, have = _shapes(state.params), _shapes(loaded)
    for name in [*want, *have]:
        if want.get(name) != have.get(name):
            raise ValueError(
                f"init_from {config.init_from}: parameter {name} has shape {have.get(name)} there, "
                f"{want.get(name)} in this model; leave the fields of `model` as they are in that run"
            )
    averages = {name: loaded[name] for name in state.ema}
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: x.copy(), tree), out_shardings=_shardings(state.ema))
    return state._replace(params=loaded, ema=copy(averages))


def copy_vocabulary(config: TrainConfig, to: Path) -> bool:
    """Copies the vocabulary of `config.init_from` to `to`; False if it has none or no run is named."""
    if (
        config.init_from is None
        or not (there := local_dir(config.init_from) / "text_tokenizer.model").is_file()
    ):
        return False
    write_atomic(to, there.read_bytes())
    return True


def copy_tokenizer(config: TrainConfig, to: Path) -> bool:
    """Copies the frozen tokenizer of `config.init_from` to `to`, config.json last; False if it has none."""
    if (
        config.init_from is None
        or not (there := local_dir(config.init_from) / "tokenizer" / "config.json").is_file()
    ):
        return False
    shutil.copytree(there.parent, to, ignore=shutil.ignore_patterns("config.json"))
    shutil.copyfile(there, to / "config.json")
    return True


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
