"""Compile the training step for devices that are not here, and say whether it fits and what it would take.

`train.py CONFIG --compile-only v5p:4x4x4` compiles the very step that training runs, with the real TPU compiler
(package libtpu), and reads memory, collectives and cycles from the result. Nothing is allocated and no TPU is
needed. `--compile-only local` compiles for the devices that are here.

Seconds and utilisation are estimates. Low: the compiler's cycles at the chip's clock, attention kernels at a
quarter of its peak, and after them all collectives at the published rates of the links. High: the collectives
cost nothing. They serve to compare layouts; only a run on the hardware says what it does.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dalle_jax import autoregressive, dalle
from dalle_jax.config import BartConfig, ClipConfig, DalleConfig, DiffusionConfig, DVAEConfig, TrainConfig
from dalle_jax.nn import flash
from dalle_jax.nn.sharding import batch_sharding, make_mesh
from dalle_jax.train import hlo
from dalle_jax.train.state import State, abstract_state, check_batch, make_step, task_optimizer
from dalle_jax.train.topology import CHIPS, DCN, Chip, parse_topology, tpu_devices

GIB = 2**30
KERNEL_SHARE = (
    1 / 4
)  # of its peak that a chip is taken to reach in attention kernels: the compiler does not say


class _CodesTask:
    """The Transformer on codes encoded ahead: it can be compiled before a tokenizer is trained."""

    def __init__(self, config: TrainConfig):
        self.config = config
        model = config.model
        self.row_shapes = {"text": ((model.text_len,), jnp.int32), "codes": ((model.num_codes,), jnp.int32)}

    def init(self, key):
        return autoregressive.init(self.config.model, key)

    def loss(self, params, frozen, batch, key, step):
        return autoregressive.loss(self.config.model, params, batch["text"], batch["codes"], key)


def _task(config: TrainConfig) -> Any:
    match config.model:
        case DalleConfig() | BartConfig():
            return _CodesTask(config)
        case DVAEConfig() | ClipConfig():
            from dalle_jax.train.tasks import make_task

            task = make_task(config)
            size = config.model.image_size
            task.row_shapes = {"image": ((size, size, 3), jnp.uint8)}
            if isinstance(config.model, ClipConfig):
                task.row_shapes["text"] = ((config.model.text_len,), jnp.int32)
            return task
        case DiffusionConfig():
            from dalle_jax.train.tasks.diffusion import DiffusionTask

            return DiffusionTask.on_codes(config)
    raise ValueError(
        f"--compile-only knows the stages dvae, dalle, bart, clip and diffusion, not {config.model.kind}"
    )


def train_flops(config: TrainConfig) -> float | None:
    """Floating-point operations of the model in one update, backward pass included, nothing computed twice.

    Six for each weight of a matrix and token, and attention over the full square; None for other stages.
    """
    model = config.model
    if not isinstance(model, DalleConfig):
        return None
    matrices = 3 if model.activation == "swiglu" else 2
    block = 4 * model.dim**2 + matrices * model.dim * model.mlp_dim
    attention = 2 * model.length * model.dim  # scores and their use, for each position
    per_token = model.layers * (block + attention)
    text = model.text_ids if model.text_loss_weight > 0 else 0
    heads = model.text_len * text + model.num_codes * model.image_vocab
    return 6.0 * config.data.batch * (model.length * per_token + model.dim * heads)


def step_and_arguments(config: TrainConfig, mesh: Mesh) -> tuple[Any, tuple[State, dict, dict]]:
    """The training step of `config` and what it is lowered for: state, frozen parameters and batch, as shapes."""
    task = _task(config)
    tx, rows = task_optimizer(task), batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((config.data.batch, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in task.row_shapes.items()
    }
    return make_step(task, tx, config, mesh), (abstract_state(task, tx, mesh), {}, batch)


def compile_step(config: TrainConfig, target: str = "local", slices: int = 1) -> dict[str, Any]:
    """Compiles the training step of `config` for `target` and describes it.

    target: a topology (see train/topology.py) or `local`. Returns `fits` (None where the memory of the device
    is not known), `peak_gib_per_device` (where it does not fit, what the compiler says it needs),
    `hbm_gib_per_device`, `memory_gib` by class, `collectives` (kind -> runs and GiB per step and device),
    `model_flops`, `step_seconds` and `estimated_mfu` (the low end) with `estimated_mfu_high` (None where there
    is no estimate), `compile_seconds`. Raises ValueError for a mesh, batch or topology that does not go
    together.
    """
    local = target == "local"
    devices = devices_of(target, slices)
    chip = None if local else CHIPS[parse_topology(target)[0]]
    mesh = make_mesh(config.mesh, devices)
    check_batch(config, mesh)
    step, arguments = step_and_arguments(config, mesh)
    abstract = arguments[0]
    limit = hbm_gib(chip, devices[0])
    memory = {
        "parameters": gib(abstract.params),
        "optimizer": gib(abstract.opt_state),
        "ema": gib(abstract.ema),
    }
    report: dict[str, Any] = {
        "target": target,
        "slices": slices,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "batch": config.data.batch,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params)),
        "hbm_gib_per_device": limit,
    }
    begin = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(str(error)):
            raise
        return report | {
            "fits": False,
            "peak_gib_per_device": needed_gib(str(error)),
            "memory_gib": memory,
            "collectives": {},
            "model_flops": train_flops(config),
            "step_seconds": None,
            "estimated_mfu": None,
            "estimated_mfu_high": None,
            "compile_seconds": round(time.monotonic() - begin, 1),
        }
    seconds = time.monotonic() - begin
    stats = compiled.memory_analysis()
    code, temporary = stats.generated_code_size_in_bytes, stats.temp_size_in_bytes
    arguments = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = (arguments + temporary + code) / GIB
    memory |= {"activations_and_gradients": temporary / GIB, "program": code / GIB}
    memory["batch_and_padding"] = max(0.0, peak - sum(memory.values()))
    found = hlo.costs(compiled.as_text())
    flops = train_flops(config)
    report |= {
        "fits": None if limit is None else peak <= limit,
        "peak_gib_per_device": peak,
        "memory_gib": memory,
        "collectives": {k: {"runs": n, "gib": b / GIB} for k, (n, b) in sorted(found.collectives.items())},
        "model_flops": flops,
    }
    kernels = _kernel_flops(config, found.kernels, len(devices))
    return (
        report | _estimate(found, kernels, chip, flops, len(devices)) | {"compile_seconds": round(seconds, 1)}
    )


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
    share = sum(flash.computed_share(masks[i]) for i in which) / len(which)
    rows = (
        config.data.batch / config.optim.accumulate / devices
    )  # times heads: however the mesh splits the two
    return total * 2 * share * flash.padded(model.length) ** 2 * model.dim * rows


def _estimate(
    found: hlo.Costs, kernel_flops: float | None, chip, flops: float | None, devices: int
) -> dict[str, Any]:
    nothing = {"step_seconds": None, "estimated_mfu": None, "estimated_mfu_high": None}
    if chip is None or not found.cycles or kernel_flops is None:
        return nothing
    sent = {kind: size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in found.collectives.items()}
    between = sent.pop("send", 0) / DCN
    busy = found.cycles / chip.clock + kernel_flops / (KERNEL_SHARE * chip.flops)
    low_seconds = busy + sum(sent.values()) / chip.ici + between
    mfu = flops / (chip.flops * devices) if flops else None
    return {
        "step_seconds": {"compute": busy, "compute_and_communication": low_seconds},
        "estimated_mfu": mfu / low_seconds if mfu else None,
        "estimated_mfu_high": mfu / busy if mfu else None,
    }


def gib(tree: Any) -> float:
    """GiB of one device's part of `tree`, ShapeDtypeStructs with shardings."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards) / GIB


def devices_of(target: str, slices: int) -> list[jax.Device]:
    """Those of a topology, or with `local` those that are here. Raises ValueError for what does not exist."""
    if target != "local":
        return tpu_devices(target, slices)
    if slices != 1:
        raise ValueError(f"--slices {slices} is for a TPU topology; local devices are what they are")
    return jax.devices()


def hbm_gib(chip: Chip | None, device: jax.Device) -> float | None:
    """Memory of the chip by its data sheet, else of the device as it says; None for a CPU."""
    if chip:
        return chip.hbm
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] / GIB if stats and "bytes_limit" in stats else None


def out_of_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message or "CompileTimeHbmOom" in message


def needed_gib(message: str) -> float | None:
    """The GiB that an out-of-memory message of the compiler says are needed; None where it gives no number."""
    unit = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT])(?:iB)? of|\(([\d.]+)([KMGT])(?:iB)?\) exceeds", message)
    return float(used[1] or used[3]) * unit[used[2] or used[4]] if used else None


def text_of(report: dict[str, Any]) -> str:
    """The report as people read it."""
    mesh = " ".join(f"{name}={size}" for name, size in report["mesh"].items())
    slices = f" in {report['slices']} slices" if report["slices"] > 1 else ""
    peak, limit = report["peak_gib_per_device"], report["hbm_gib_per_device"]
    room = "more" if peak is None else f"{peak:.2f} GiB"
    room += f" of {limit:g} GiB" if limit else ""
    verdict = {True: "fits", False: "DOES NOT FIT", None: "memory of the device is not known"}[report["fits"]]
    lines = [
        f"target       {report['target']}: {report['devices']} x {report['device_kind']}{slices}, mesh {mesh}",
        f"model        {report['parameters']:,} parameters, batch {report['batch']}",
        f"memory       {room} per device: {verdict}",
        *(f"  {name:<26}{size:8.2f} GiB" for name, size in report["memory_gib"].items()),
    ]
    if report["collectives"]:
        lines.append("collectives  per step and device, bytes of the results")
        lines += [f"  {k:<20}{v['runs']:>6} x {v['gib']:10.3f} GiB" for k, v in report["collectives"].items()]
    if report["model_flops"]:
        lines.append(
            f"model FLOPs  {report['model_flops']:.3e} per step (6 per weight and token, full attention)"
        )
    if seconds := report["step_seconds"]:
        low, high = seconds["compute_and_communication"], seconds["compute"]
        lines.append(
            f"step         {high:.2f} to {low:.2f} s, an estimate: cycles of the compiler, links at rate"
        )
        if report["estimated_mfu"] is not None:
            lines.append(
                f"utilisation  {report['estimated_mfu']:.1%} to {report['estimated_mfu_high']:.1%} of peak, an estimate"
            )
    lines.append(f"compiled in  {report['compile_seconds']:.1f} s")
    return "\n".join(lines)


def split_flags(argv: list[str]) -> tuple[list[str], argparse.Namespace]:
    """The flags of this command taken out of a command line of train.py; the rest is the configuration's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--compile-only")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    flags, rest = parser.parse_known_args(argv)
    if flags.compile_only is None:  # the others mean nothing then, and are refused with all unknown flags
        return argv, flags
    return rest, flags


def main(config: TrainConfig, flags: argparse.Namespace, prog: str) -> int:
    """Prints the report. 0: it fits. 2: mesh, batch or topology do not go together. 3: it does not fit."""
    try:
        if flags.sample is not None:
            from dalle_jax.train import compile_sample  # it takes helpers from here

            report = compile_sample.compile_sample(config, flags.compile_only, flags.sample, flags.slices)
            told = compile_sample.text_of(report)
        else:
            report = compile_step(config, flags.compile_only, flags.slices)
            told = text_of(report)
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    print(told, file=sys.stderr if flags.json else sys.stdout)
    if flags.json:
        print(json.dumps(report))
    return 3 if report["fits"] is False else 0
