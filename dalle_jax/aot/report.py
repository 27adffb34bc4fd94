"""What a compiled program takes of devices that are not here: memory, collectives, and an estimate of its time.

Seconds and mfu are estimates. Low: the compiler's cycles at the chip's clock, attention kernels at a
quarter of its peak, and after them all collectives at the published rates of the links. High: the collectives
cost nothing. They serve to compare layouts; only a run on the hardware says what it does. For GPUs, whose compiler
gives no cycles: roofline.py.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dalle_jax.aot import hlo, roofline
from dalle_jax.aot.gpu_targets import GPUS, Gpu, gpu_devices, is_gpu, memory_fraction, parse_gpus
from dalle_jax.aot.tpu_targets import CHIPS, DCN, Chip, parse_topology, tpu_devices
from dalle_jax.train.compiler_options import compiler_option_error

GIB = 2**30
KERNEL_SHARE = (
    1 / 4
)  # of its peak that a chip is taken to reach in attention kernels: the compiler does not say

CompileReport = dict[str, Any]


class Target(NamedTuple):
    """Devices to compile for. chip, gpu: what is published about one, or None; hbm: its GiB of memory that a program
    may have, or None; share: which part of all that is, where jax does not take all."""

    name: str
    slices: int
    devices: list[jax.Device]
    chip: Chip | None
    hbm: float | None
    gpu: Gpu | None = None
    share: float | None = None

    def about(self) -> CompileReport:
        """What every report begins with."""
        return {
            "target": self.name,
            "slices": self.slices,
            "devices": len(self.devices),
            "device_kind": self.devices[0].device_kind,
            "hbm_gib_per_device": self.hbm,
            "hbm_share": self.share,
        }


def parse_target(name: str, slices: int = 1) -> Target:
    """The devices of a topology or the GPUs of a host, or with `local` those that are here.

    Memory is that of the chip's data sheet, of a GPU the share of it that jax takes, else what the device says; None
    for a CPU. Raises ValueError for what does not exist, ModuleNotFoundError where the compiler is not installed.
    """
    if is_gpu(name):
        gpu, share = parse_gpus(name)[0], memory_fraction()
        return Target(name, slices, gpu_devices(name, slices), None, gpu.memory * share, gpu, share)
    if name != "local":
        devices, chip = tpu_devices(name, slices), CHIPS[parse_topology(name)[0]]
        return Target(name, slices, devices, chip, chip.hbm)
    if slices != 1:
        raise ValueError(f"--slices {slices} is for a TPU topology; local devices are what they are")
    devices = jax.devices()
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    limit = stats["bytes_limit"] / GIB if stats and "bytes_limit" in stats else None
    gpu = next((gpu for gpu in GPUS.values() if gpu.kind == devices[0].device_kind), None)
    return Target(name, slices, devices, None, limit, gpu)


def one_device(name: str, asked: str, slices: int = 1) -> Target:
    """A target of a single device, of those that are here the first, for the flag `asked`. Raises what `parse_target`
    does, and ValueError for more devices."""
    if is_gpu(name):
        chips, ones = parse_gpus(name)[1], name.partition(":")[0]
    else:
        chips = 1 if name == "local" else slices * math.prod(parse_topology(name)[1])
        ones = "v5e:1x1, v6e:1x1, v4:1x1x1 or v5p:1x1x1"
    if chips != 1:
        raise ValueError(f"{asked} compiles for one chip and {name} has {chips}; want {ones}")
    where = parse_target(name, slices)
    return where._replace(devices=where.devices[:1])


def measure(
    lower: Callable[[], Any],
    mesh: Mesh,
    target: Target,
    known: dict[str, float],
    keep: str | None = None,
    held: float | None = None,
) -> tuple[CompileReport, hlo.Costs | None, str]:
    """Compiles what `lower` lowers, and tells its memory, collectives and the time of compiling.

    known: GiB per device of what the program is given, by class. keep: file for the text of the compiled program. held:
    GiB that lie on a device before the program runs, where that is not what it is given.
    Returns the fields `fits` (None where the memory of the device is not known), `peak_gib_per_device` (where it
    does not fit, what the compiler says it needs), `memory_gib`, `collectives` (kind -> runs and GiB) and
    `compile_seconds`; what the program costs and its text, None and empty where the compiler gave up for want of
    memory. Raises ValueError for an option that the compiler does not have.
    """
    begin = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (refused := compiler_option_error(error)) is not None:
            raise ValueError(refused) from None
        if not out_of_memory(str(error)):
            raise
        return (
            {
                "fits": False,
                "peak_gib_per_device": needed_gib(str(error)),
                "memory_gib": known,
                "collectives": {},
                "compile_seconds": round(time.monotonic() - begin, 1),
            },
            None,
            "",
        )
    seconds, stats = time.monotonic() - begin, program.memory_analysis()
    code, temporary = stats.generated_code_size_in_bytes, stats.temp_size_in_bytes
    arguments = stats.argument_size_in_bytes - stats.alias_size_in_bytes if held is None else held * GIB
    peak = (arguments + stats.output_size_in_bytes + temporary + code) / GIB
    memory = {**known, "temporaries": temporary / GIB, "program": code / GIB}
    memory["batch_and_padding"] = max(0.0, peak - sum(memory.values()))
    text = program.as_text()
    if keep is not None:
        Path(keep).write_text(text, encoding="utf-8")
    costs = hlo.costs(text)
    return (
        {
            "fits": None if target.hbm is None else peak <= target.hbm,
            "peak_gib_per_device": peak,
            "memory_gib": memory,
            "collectives": {
                k: {"runs": n, "gib": b / GIB} for k, (n, b) in sorted(costs.collectives.items())
            },
            "compile_seconds": round(seconds, 1),
        },
        costs,
        text,
    )


def estimate(
    costs: hlo.Costs | None, text: str, target: Target, model_flops: float, kernel_flops: float | None
) -> CompileReport:
    """`step_seconds` and `estimated_mfu` (low), `estimated_mfu_high`, and `roofline_seconds` on a GPU; None where nothing
    can be said.

    kernel_flops: operations per device inside of attention kernels, None where they are not known.
    """
    chip, count = target.chip, len(target.devices)
    nothing = {
        "step_seconds": None,
        "estimated_mfu": None,
        "estimated_mfu_high": None,
        "roofline_seconds": None,
    }
    if target.gpu is not None and costs is not None:
        least = roofline.roofline_seconds(text, target.gpu, count, model_flops)
        return nothing | {"roofline_seconds": least}
    if costs is None or chip is None or not costs.cycles or kernel_flops is None:
        return nothing
    sent = {kind: size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in costs.collectives.items()}
    between = sent.pop("send", 0) / DCN
    busy = costs.cycles / chip.clock + kernel_flops / (KERNEL_SHARE * chip.flops)
    low_seconds = busy + sum(sent.values()) / chip.ici + between
    at_peak = model_flops / (chip.flops * count)
    return nothing | {
        "step_seconds": {"compute": busy, "compute_and_communication": low_seconds},
        "estimated_mfu": at_peak / low_seconds,
        "estimated_mfu_high": at_peak / busy,
    }


def tree_gib(tree: Any) -> float:
    """GiB of one device's part of `tree`, ShapeDtypeStructs with shardings."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards) / GIB


def out_of_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message or "CompileTimeHbmOom" in message


def needed_gib(message: str) -> float | None:
    """The GiB that an out-of-memory message of the compiler says are needed; None where it gives no number."""
    unit = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT])(?:iB)? of|\(([\d.]+)([KMGT])(?:iB)?\) exceeds", message)
    return float(used[1] or used[3]) * unit[used[2] or used[4]] if used else None


def format_report(report: CompileReport) -> str:
    """The report as people read it."""
    mesh = " ".join(f"{name}={size}" for name, size in report["mesh"].items())
    slices = f" in {report['slices']} slices" if report["slices"] > 1 else ""
    peak, limit = report["peak_gib_per_device"], report["hbm_gib_per_device"]
    room = "more" if peak is None else f"{peak:.2f} GiB"
    room += f" of {limit:.4g} GiB" if limit else ""
    if share := report["hbm_share"]:
        room += f", {share:.0%} of the GPU's {limit / share:.4g} (XLA_PYTHON_CLIENT_MEM_FRACTION),"
    verdict = {True: "fits", False: "DOES NOT FIT", None: "memory of the device is not known"}[report["fits"]]
    lines = [
        f"target       {report['target']}: {report['devices']} x {report['device_kind']}{slices}, mesh {mesh}",
        f"program      {report['program']}",
        f"model        {report['parameters']:,} parameters, batch {report['batch']}",
        f"memory       {room} per device: {verdict}",
        *(f"  {name:<26}{size:8.2f} GiB" for name, size in report["memory_gib"].items()),
    ]
    if report["collectives"]:
        lines.append("collectives  per run and device, bytes of the results")
        lines += [f"  {k:<20}{v['runs']:>6} x {v['gib']:10.3f} GiB" for k, v in report["collectives"].items()]
    lines.append(
        f"model FLOPs  {report['model_flops']:.3e} for all devices, products that the model asks for"
    )
    if seconds := report["step_seconds"]:
        low, high = seconds["compute_and_communication"], seconds["compute"]
        lines += [
            f"time         {high:.3g} to {low:.3g} s, an estimate: cycles of the compiler, links at rate",
            f"mfu  {report['estimated_mfu']:.1%} to {report['estimated_mfu_high']:.1%} of peak, an estimate",
        ]
    lines += roofline.format_loop_report(report)
    if report["compiler_options"]:
        told = " ".join(f"{name}={value}" for name, value in report["compiler_options"].items())
        lines.append(f"options      {told}")
    lines.append(f"compiled in  {report['compile_seconds']:.1f} s")
    return "\n".join(lines)
