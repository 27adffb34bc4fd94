"""Compile the training step for devices that are not here, and say whether it fits and what it would take.

`train.py CONFIG --compile-only v5p:4x4x4` compiles the very step that training runs, of any stage, with the real
TPU compiler (package libtpu), and reads memory, collectives and cycles from the result. Nothing is allocated and no
TPU is needed. `--compile-only h200:8` does the same with XLA's GPU compiler (gpus.py), `--compile-only local` for the
devices that are here. What is estimated, and how: compile_report.py, for GPUs roofline.py.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from dalle_jax.aot import report as compile_report
from dalle_jax.aot.report import CompileReport, parse_target, tree_gib
from dalle_jax.config import DalleConfig, TrainConfig
from dalle_jax.models import dalle
from dalle_jax.nn import flash
from dalle_jax.parallel.sharding import batch_sharding, make_mesh, param_shardings
from dalle_jax.train.compiler_options import compiler_options
from dalle_jax.train.flops import batch_shapes, train_flops
from dalle_jax.train.state import TrainState, abstract_state, check_batch, make_step, task_optimizer
from dalle_jax.train.tasks import make_task


def step_and_arguments(config: TrainConfig, mesh: Mesh) -> tuple[Any, tuple[TrainState, dict, dict]]:
    """The training step of `config` and what it is lowered for: state, frozen parameters and batch, as shapes.

    Stages that read image tokens are taken on codes encoded ahead, so that no tokenizer has to exist.
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


def compile_step(
    config: TrainConfig, target: str = "local", slices: int = 1, keep: str | None = None
) -> CompileReport:
    """Compiles the training step of `config` for `target` and describes it.

    target: a topology (topology.py), GPUs of a host (gpus.py) or `local`. keep: file for the text of the compiled
    program. Returns `fits` (None where the memory of the device is not known), `peak_gib_per_device` (where it does not
    fit, what the compiler says it needs), `hbm_gib_per_device` and `hbm_share`, what a program may have and which part
    of a GPU's memory that is, `memory_gib` by class, `collectives` (kind -> runs and GiB per step and device),
    `model_flops`, `step_seconds` and `estimated_mfu` (the low end) with `estimated_mfu_high` (None where there is no
    estimate), `roofline_seconds` of GPUs (roofline.py), `compiler_options`, `compile_seconds`. Raises ValueError for a
    mesh, batch, target or compiler option that does not go with the rest.
    """
    where = parse_target(target, slices)
    mesh = make_mesh(config.mesh, where.devices)
    check_batch(config, mesh)
    flops = train_flops(make_task(config))
    step, arguments = step_and_arguments(config, mesh)
    abstract, frozen, _ = arguments
    known = {
        "parameters": tree_gib(abstract.params),
        "optimizer": tree_gib(abstract.opt_state),
        "ema": tree_gib(abstract.ema),
    }
    if frozen:
        known["frozen"] = tree_gib(frozen)
    report = where.about() | {
        "program": f"training step of a {config.model.kind}",
        "mesh": dict(mesh.shape),
        "batch": config.data.batch_size,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params)),
        "compiler_options": compiler_options(mesh, config.compiler_options),
        "model_flops": flops,
    }
    found, costs, text = compile_report.measure(lambda: step.lower(*arguments), mesh, where, known, keep)
    kernels = costs and _kernel_flops(config, costs.kernels, len(where.devices))
    times = compile_report.estimate(costs, text, where, flops, kernels)
    return report | found | times | {"decoding": None}


def _kernel_flops(config: TrainConfig, kernels: dict[str, int], devices: int) -> float | None:
    """Operations per device of splash's kernels in the blocks that they compute; None where there are others.

    Products of the square of positions and the width of a head: two forward, three for the gradient of the
    queries, four for that of keys and values.
    """
    model, total = config.model, 0.0
    for name, runs in kernels.items():
        products = [n for part, n in (("_fwd_", 2), ("_dq_", 3), ("_dkv_", 4)) if part in name]
        if not name.startswith("splash_mha") or not products or not isinstance(model, DalleConfig):
            return None
        total += runs * products[0]
    if not total:
        return 0.0
    masks, which = dalle.layer_masks(model)
    share = sum(flash.block_density(masks[i]) for i in which) / len(which)
    rows = (
        config.data.batch_size / config.optim.grad_accum_steps / devices
    )  # times heads: however the mesh splits the two
    return total * 2 * share * flash.padded_length(model.seq_len) ** 2 * model.dim * rows
