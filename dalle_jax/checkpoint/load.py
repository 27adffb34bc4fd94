"""The model of a run directory: its configuration and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh

from dalle_jax.checkpoint import remote_dir
from dalle_jax.checkpoint.layout import PARAMS_FILE
from dalle_jax.checkpoint.manager import CheckpointManager, check_checkpoint_shapes, on_one_device
from dalle_jax.checkpoint.params_file import read_params
from dalle_jax.checkpoint.run_dir import read_run_config
from dalle_jax.config import TrainConfig
from dalle_jax.models.registry import model_params, model_shapes
from dalle_jax.parallel.sharding import param_shardings
from dalle_jax.typing import Params


class Run(NamedTuple):
    """A trained model.

    Attributes:
      config: The configuration of its training run.
      params: Its parameters, nested dicts of float32 arrays.
      path: The run directory on local disk.
      step: The training step of the parameters.
    """

    config: TrainConfig
    params: Params
    path: Path
    step: int


def load_run(
    path: str | Path,
    kind: str | None = None,
    step: Literal["best", "latest"] | int = "best",
    ema: bool = True,
    mesh: Mesh | None = None,
    device: jax.Device | None = None,
) -> Run:
    """Load the model of a run directory; only its parameters are read, nothing is written.

    Args:
      path: The run directory or its URL.
      kind: The expected kind of model (`dvae`, `vqgan`, `dalle`, `bart`, `clip`, `diffusion`); None accepts any.
      step: The checkpoint: `best` by the evaluation metric, or the latest where none was evaluated; `latest`; or the
        number of a saved step. An exported or imported run has one set of parameters.
      ema: Load the averaged parameters if the run has them.
      mesh: Shard the parameters over this mesh by the sharding table; then all processes must call.
      device: Without a mesh: the device of the parameters; None is the first one of this process.

    Returns:
      The model.

    Raises:
      FileNotFoundError: There is no directory, no config.json or no checkpoint.
      ValueError: The run is of another kind, or the parameters do not have the shapes of its configuration.
      OSError: A file cannot be read.
    """
    config = read_run_config(path)
    local = remote_dir.local_dir(path)
    if kind is not None and config.model.kind != kind:
        raise ValueError(f"Expected a run of stage {kind}, got {path} of stage {config.model.kind}.")
    directory = remote_dir.checkpoints_of(local)
    if not directory.is_dir() and (local / PARAMS_FILE).is_file():
        params, saved_step = read_params(local / PARAMS_FILE, config.model)
        where = (device or jax.local_devices()[0]) if mesh is None else param_shardings(mesh, params)
        return Run(config, jax.device_put(params, where), local, saved_step)
    no_checkpoint = (
        f"Expected a checkpoint in {path}, got none. Train the run first, or wait for its first save."
    )
    if not directory.is_dir():
        raise FileNotFoundError(no_checkpoint)
    checkpoints = CheckpointManager(directory, alone=mesh is None)
    try:
        if isinstance(step, int):
            saved_step = step
        else:
            best = checkpoints.best if step == "best" else None
            if (saved_step := checkpoints.latest if best is None else best) is None:
                raise FileNotFoundError(no_checkpoint)
        saved = checkpoints.shapes(saved_step)
        name = "ema" if ema and saved.get("ema") else "params"
        shapes = saved[name]
        check_checkpoint_shapes(
            model_shapes(config.model), model_params(config.model, shapes), directory / str(saved_step)
        )
        if mesh is None:
            abstract = on_one_device(shapes, device)
        else:
            abstract = jax.tree.map(
                lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h),
                shapes,
                param_shardings(mesh, shapes),
            )
        params = checkpoints.load(saved_step, {name: abstract}, partial=True)[name]
    finally:
        checkpoints.close()
    return Run(config, model_params(config.model, params), local, saved_step)
