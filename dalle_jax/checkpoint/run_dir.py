"""The run directory: everything a run makes, and all that is needed to use what it made.

    config.json      the configuration, every field
    text_tokenizer.model       BPE vocabulary (stages that read captions)
    tokenizer/       config.json and model.safetensors of the frozen tokenizer (stages that read image tokens)
    checkpoints/     one directory per saved step; an exported run has model.safetensors instead
    metrics.jsonl    one JSON object per line
    events/          the same figures for TensorBoard
    samples/         step_XXXXXXXX.png
    bad_records.jsonl   records of the data that cannot be used, with the cause

A directory without config.json is not a run. config.json is written beside its place and renamed, so it is
whole or missing. The directory may be a URL, `gs://BUCKET/RUN` (checkpoint/remote_dir.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dalle_jax.checkpoint import remote_dir
from dalle_jax.checkpoint.manager import CheckpointManager, check_shapes, load_params, on_one_device
from dalle_jax.config import ModelConfig, TrainConfig, from_json, to_json
from dalle_jax.files.atomic import write_atomic
from dalle_jax.importers.formats import safetensors
from dalle_jax.models.registry import model_params, model_shapes
from dalle_jax.parallel.sharding import param_shardings, path_name
from dalle_jax.typing import Params

# Fields that may differ when a run goes on: none of them changes what a training step computes from its
# state, but `steps`, which also stretches the learning rate's schedule where optim.decay_steps is None.
RESUMABLE_FIELDS = (
    "run", "steps", "log_every", "eval_every", "eval_rows", "sample_every", "save_every", "max_checkpoints", "mesh",
    "distributed", "profile", "compilation_cache_dir", "compiler_options", "data.num_threads", "data.num_workers",
    "data.prefetch",
)  # fmt: skip


PARAMS_FILE = "model.safetensors"  # of an exported run, in place of checkpoints/


class Run(NamedTuple):
    """A trained model: its configuration, the parameters to use, its directory, and the step they are of."""

    config: TrainConfig
    params: Params
    path: Path
    step: int


def model_kind(config: TrainConfig) -> str:
    """`dvae`, `vqgan`, `dalle`, `clip`, `diffusion`: the type of `config.model`."""
    return config.model.kind


def read_config(path: str | Path) -> TrainConfig:
    """The configuration of the run directory `path`.

    Raises FileNotFoundError for a directory that is missing or has no config.json, ValueError for a broken
    one.
    """
    local = remote_dir.local_dir(path)
    if not local.exists():
        raise FileNotFoundError(f"no run directory {path}; give the directory that training made")
    file = local / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a run directory: it has no config.json")
    try:
        return from_json(TrainConfig, file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a configuration of this version: {error}") from error


def open_run_dir(config: TrainConfig) -> Path:
    """The run directory of `config`, made or checked to be this run's.

    A directory that is missing or empty becomes this run's. One that holds a run of the same configuration,
    the fields FREE aside, goes on, and config.json takes the new values of those fields. Anything else
    raises ValueError and is left as it is. On several processes all call, and the first one writes. For a URL
    the directory is the mirror of it in this process.
    """
    if not config.run:
        raise ValueError("no run directory: pass --run DIR, where everything that the run makes will be")
    path = remote_dir.local_dir(config.run)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; want a run directory, new or begun: choose another --run")
    file = path / "config.json"
    if file.exists():
        differing = _differences(read_config(path), config)
        if differing:
            lines = "\n  ".join(differing)
            saves = remote_dir.checkpoints_of(path)
            begun = saves.is_dir() and any(saves.iterdir())
            new = "" if begun else ", or delete that directory, which has no checkpoint yet"
            raise ValueError(
                f"{path} holds another run:\n  {lines}\n"
                f"Choose another --run, or give the run's own values to go on with it{new}"
            )
    elif path.is_dir():
        found = sorted(p.name for p in path.iterdir() if not p.name.startswith(".config.json."))
        if found:
            more = ", ..." if len(found) > 5 else ""
            raise ValueError(
                f"{path} is not empty and not a run: no config.json, but {', '.join(found[:5])}{more}; "
                "choose another --run"
            )
    if jax.process_index() == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the run directory {path}: {error.strerror or error}") from error
        # Where this process is among others is no part of the run.
        alone = dataclasses.replace(
            config.distributed, coordinator_address=None, num_processes=None, process_id=None
        )
        text = to_json(dataclasses.replace(config, distributed=alone))
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_atomic(file, text)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("open_run_dir")
        if not remote_dir.is_url(config.run) and not file.exists():
            raise ValueError(
                f"process {jax.process_index()} does not see {file}, which process 0 has written; want a run "
                "directory on a disk that all processes share, or gs://BUCKET/RUN"
            )
    return path


@contextlib.contextmanager
def opened_run_dir(config: TrainConfig) -> Iterator[Path]:
    """`open_run_dir(config)`, taken back if the block fails before it has put anything into a new directory.

    So a data file that is missing, found out while the run is prepared, leaves no empty run behind.
    """
    path = remote_dir.local_dir(config.run)
    new = not (path / "config.json").exists()
    made = new and not path.exists()
    open_run_dir(config)
    try:
        yield path
    except BaseException:
        if new and jax.process_index() == 0 and [p.name for p in path.iterdir()] == ["config.json"]:
            (path / "config.json").unlink()
            if made:
                path.rmdir()
        raise


def sync_run_dir(run_dir: Path) -> None:
    """What the first process has written into the run directory is there for all; all call.

    On a shared disk that takes waiting for it; through a bucket it is copied up, then down.
    """
    if jax.process_index() == 0:
        remote_dir.push(run_dir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("share")
        if jax.process_index() > 0:
            remote_dir.pull(run_dir)


def _differences(run: TrainConfig, command: TrainConfig) -> list[str]:
    """`field: run has X, command gives Y` for each field that must not differ."""
    if model_kind(run) != model_kind(command):
        return [f"stage: run has {model_kind(run)}, command gives {model_kind(command)}"]
    old, new = _flat(dataclasses.asdict(run)), _flat(dataclasses.asdict(command))
    lines = []
    for name in [*old, *(n for n in new if n not in old)]:
        free = any(name == f or name.startswith(f + ".") for f in RESUMABLE_FIELDS)
        if not free and old.get(name) != new.get(name):
            lines.append(f"{name}: run has {old.get(name)!r}, command gives {new.get(name)!r}")
    return lines


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def load_run(
    path: str | Path,
    stage: str | None = None,
    which: Literal["best", "latest"] | int = "best",
    ema: bool = True,
    mesh: Mesh | None = None,
    device: jax.Device | None = None,
) -> Run:
    """The model of a run directory, ready for use; reads its parameters only, writes nothing.

    Args:
      stage: what the run must be (`dvae`, `vqgan`, `dalle`, `clip`, `diffusion`); None takes any.
      which: `best` is the checkpoint with the best evaluation measure, or the latest where none was measured;
        or `latest`, or the number of a saved step.
      ema: take the averaged parameters if the run has them.
      mesh: where to put the parameters, by the sharding table, and then all processes must call; None is whole on
        `device`, or the first one of this process.

    Raises FileNotFoundError for no directory, no config.json or no checkpoint yet; ValueError for another
    stage or a checkpoint that does not fit; OSError for one that cannot be read.
    """
    config = read_config(path)
    local = remote_dir.local_dir(path)
    if stage is not None and config.model.kind != stage:
        raise ValueError(f"{path} is a run of stage {config.model.kind}, want one of stage {stage}")
    directory = remote_dir.checkpoints_of(local)
    if not directory.is_dir() and (local / PARAMS_FILE).is_file():
        params, step = read_params(local / PARAMS_FILE, config.model)
        where = (device or jax.local_devices()[0]) if mesh is None else param_shardings(mesh, params)
        return Run(config, jax.device_put(params, where), local, step)
    if not directory.is_dir():
        raise FileNotFoundError(f"{path} has no checkpoint yet; train it first, or wait for its first save")
    checkpoints = CheckpointManager(directory, alone=mesh is None)
    try:
        step = which if isinstance(which, int) else checkpoints.latest
        if which == "best" and checkpoints.best is not None:
            step = checkpoints.best
        if step is None:
            raise FileNotFoundError(
                f"{path} has no checkpoint yet; train it first, or wait for its first save"
            )
        saved = checkpoints.shapes(step)
        name = "ema" if ema and saved.get("ema") else "params"
        shapes = saved[name]
        if mesh is None:
            abstract = on_one_device(shapes, device)
        else:
            abstract = jax.tree.map(
                lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h),
                shapes,
                param_shardings(mesh, shapes),
            )
        params = checkpoints.load(step, {name: abstract}, partial=True)[name]
    finally:
        checkpoints.close()
    return Run(config, model_params(config.model, params), local, step)


def load_model(path: str | Path, stage: str | None = None, device: jax.Device | None = None) -> Run:
    """The model of a run directory to draw or measure with: `load_run`, and its arrays are those of config.json.

    Raises what `load_run` raises, ValueError for arrays of other names or shapes too: some of them would not fail but
    draw something else."""
    run = load_run(path, stage, device=device)
    check_shapes(model_shapes(run.config.model), run.params, path)
    return run


def write_params(path: Path, params: Params, step: int) -> int:
    """The parameters of a model as one safetensors file, names joined by dots; returns how many there are."""
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    arrays = {path_name(keys).replace("/", "."): np.asarray(jax.device_get(leaf)) for keys, leaf in pairs}
    safetensors.write_safetensors(path, arrays, {"format": "dalle_jax", "step": str(step)})
    return sum(array.size for array in arrays.values())


def read_params(path: Path, model: ModelConfig) -> tuple[Params, int]:
    """Parameters and step of what `write_params` wrote for `model`.

    Raises ValueError naming the array that is missing, too many, of another shape or dtype, or not finite.
    """
    arrays, metadata = safetensors.read_safetensors(path)
    shapes = model_shapes(model)
    tree = jax.tree.structure(shapes)
    want = {name.replace("/", "."): leaf for name, leaf in shapes_by_name(model).items()}
    for name in [*want, *arrays]:
        if name not in arrays or name not in want:
            how = "is missing" if name in want else f"is not one of a {model.kind} of this configuration"
            raise ValueError(f"{path}: array {name} {how}")
        got, leaf = arrays[name], want[name]
        if (got.shape, got.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{path}: array {name} is {got.dtype} {got.shape}, config.json wants {leaf.dtype} {leaf.shape}"
            )
        if not np.isfinite(got).all():
            raise ValueError(f"{path}: array {name} has values that are not finite")
    step = metadata.get("step", "0")
    return jax.tree.unflatten(tree, [arrays[name] for name in want]), int(step) if step.isdigit() else 0


def shapes_by_name(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of a model, by its path `a/b/c`."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(model_shapes(model))
    return {path_name(keys): leaf for keys, leaf in pairs}


def fingerprint(model: ModelConfig, params: Params) -> str:
    """16 hex digits that change with any parameter of a model: codes tell by it who made them.

    Fields of the configuration are not in it: one that a later version adds would part a tokenizer from its
    codes, and the sizes that matter show in the parameters.
    """
    digest = hashlib.sha256(model.kind.encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        leaf = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:16]


def save_frozen(path: Path, run: Run) -> None:
    """A copy of the model of `run` for another run to use: `path/model.safetensors`, then `path/config.json`.

    config.json comes last: a directory that has it is whole. One process writes, alone: Orbax could not, where
    there are several.
    """
    path.mkdir(parents=True, exist_ok=True)
    write_params(path / PARAMS_FILE, run.params, run.step)
    write_atomic(path / "config.json", to_json(run.config))


def load_frozen(path: Path) -> tuple[ModelConfig, Params, str]:
    """Configuration, parameters (on the first device) and fingerprint of what `save_frozen` wrote.

    Runs of earlier versions have an Orbax directory params/ in place of model.safetensors.
    """
    model = read_config(path).model
    if (path / PARAMS_FILE).is_file():
        params = jax.device_put(read_params(path / PARAMS_FILE, model)[0], jax.local_devices()[0])
    else:
        params = load_params(path / "params")
    return model, params, fingerprint(model, params)
