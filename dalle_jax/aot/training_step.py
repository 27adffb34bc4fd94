"""Ahead-of-time compilation of the training step, for attached or absent devices.

The step is the one that training runs, of any stage, compiled by the real TPU compiler (package libtpu) or XLA's GPU
compiler. Nothing is allocated and no accelerator is needed. The report has its memory, collectives and time
(report.py).
"""

from __future__ import annotations

import math
from functools import partial

import jax
from jax.sharding import Mesh

from dalle_jax.aot.report import CompileReport, Program, compile_and_report, tree_gib
from dalle_jax.aot.targets import make_target
from dalle_jax.config import DalleConfig, TrainConfig
from dalle_jax.models import dalle
from dalle_jax.nn import flash
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding, param_shardings
from dalle_jax.train.compiler_options import compiler_options
from dalle_jax.train.flops import batch_shapes, train_flops
from dalle_jax.train.state import TrainState, abstract_state, check_batch, make_step, task_optimizer
from dalle_jax.train.tasks import make_task
from dalle_jax.typing import Batch, Params


def training_step_and_arguments(
    config: TrainConfig, mesh: Mesh
) -> tuple[jax.stages.Wrapped, tuple[TrainState, Params, Batch]]:
    """Return the training step of a configuration and its abstract arguments.

    Stages that read image tokens get batches of tokens, so no image tokenizer has to exist.

    Returns:
      The jitted step, and state, frozen parameters and batch as ShapeDtypeStructs with shardings.
    """
    task = make_task(config)
    tx, batch = task_optimizer(task), batch_shapes(task, config.data.batch_size, batch_sharding(mesh))
    frozen = {}
    if task.frozen:
        frozen = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            task.frozen,
            param_shardings(mesh, task.frozen),
        )
    return make_step(task, tx, config, mesh), (abstract_state(task, tx, mesh), frozen, batch)


def compile_training_step(
    config: TrainConfig, target: str = "local", num_slices: int = 1, hlo_path: str | None = None
) -> CompileReport:
    """Compile the training step of a configuration and report on it.

    Args:
      config: Configuration of the run.
      target: A TPU topology (tpu_targets.py), GPUs of one host (gpu_targets.py), or "local".
      num_slices: TPU slices of this topology.
      hlo_path: File for the optimized HLO; None writes none.

    Raises:
      ValueError: If the mesh, batch, target and compiler options do not match.
      ModuleNotFoundError: If the compiler of the target is not installed.
    """
    devices = make_target(target, num_slices)
    mesh = make_mesh(config.mesh, devices.devices)
    check_batch(config, mesh)
    step, arguments = training_step_and_arguments(config, mesh)
    state, frozen, _ = arguments
    memory_gib = {
        "parameters": tree_gib(state.params),
        "optimizer": tree_gib(state.opt_state),
        "ema": tree_gib(state.ema),
    }
    if frozen:
        memory_gib["frozen"] = tree_gib(frozen)
    program = Program(
        lower=lambda: step.lower(*arguments),
        description=f"training step of a {config.model.kind}",
        mesh=mesh,
        batch_size=config.data.batch_size,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        model_flops=train_flops(make_task(config)),
        memory_gib=memory_gib,
        compiler_options=compiler_options(mesh, config.compiler_options),
    )
    report, _ = compile_and_report(
        program, devices, hlo_path, partial(_splash_flops, config, len(devices.devices))
    )
    return report


def _splash_flops(config: TrainConfig, num_devices: int, kernels: dict[str, int]) -> float | None:
    """Return the FLOPs on one device of splash attention kernels in the blocks that they compute; None for others.

    Per pair of query and key the forward pass has two products of the head dimension, the query gradient three, and the
    key and value gradients four.
    """
    model, total = config.model, 0.0
    for name, runs in kernels.items():
        products = [n for part, n in (("_fwd_", 2), ("_dq_", 3), ("_dkv_", 4)) if part in name]
        if not name.startswith("splash_mha") or not products:
            return None
        total += runs * products[0]
    if not total:
        return 0.0
    if not isinstance(model, DalleConfig):
        return None
    masks, mask_of_layer = dalle.layer_masks(model)
    density = sum(flash.block_density(masks[i]) for i in mask_of_layer) / len(mask_of_layer)
    # Rows times heads of a device is the same however the mesh splits the two.
    rows = config.data.batch_size / config.optim.grad_accum_steps / num_devices
    return total * 2 * density * flash.padded_length(model.seq_len) ** 2 * model.dim * rows
