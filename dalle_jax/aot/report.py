"""Report on a compiled program: memory, collectives and an estimate of its time.

Seconds and MFU are estimates. The low MFU adds the compiler's cycles at the clock of the chip, attention kernels at a
quarter of peak, and all collectives at the published bandwidth of the links, without overlap. The high MFU leaves out
the collectives. The estimates serve to compare layouts; only a run on the hardware gives the speed. For GPUs, whose
compiler gives no cycles, roofline.py gives a bound instead.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
from jax.sharding import Mesh

from dalle_jax.aot import hlo, roofline
from dalle_jax.aot.targets import GIB, Target
from dalle_jax.aot.tpu_targets import DCN_BANDWIDTH
from dalle_jax.train.compiler_options import compiler_option_error

# Fraction of peak that attention kernels are assumed to reach: the compiler has no estimate for them.
_KERNEL_PEAK_FRACTION = 1 / 4


class CollectiveReport(TypedDict):
    """Collectives of one kind: runs for each run of the program, and GiB of their results on one device."""

    runs: int
    gib: float


class CompileReport(TypedDict):
    """Report on a compiled program.

    Attributes:
      target: Name of the target.
      num_slices: TPU slices.
      num_devices: Devices of all slices.
      device_kind: Kind of the devices.
      program: What the program does.
      mesh: Axis -> size.
      batch_size: Rows of the batch.
      parameters: Number of parameters.
      compiler_options: Options that the program was compiled with.
      fits: Whether it fits into memory; None if the memory of the device is unknown.
      peak_gib_per_device: Memory that it needs; None if the compiler ran out of memory and did not say.
      hbm_gib_per_device: Memory that it may use; None if unknown.
      hbm_fraction: Fraction of the memory of a GPU that jax allocates; None elsewhere.
      memory_gib: Memory by class.
      collectives: Collectives by kind.
      compile_seconds: Time of the compilation.
      model_flops: Model FLOPs of all devices.
      step_seconds: Estimates `compute` and `compute_and_communication`; None without an estimate.
      estimated_mfu: MFU with collectives; None without an estimate.
      estimated_mfu_high: MFU without collectives; None without an estimate.
      roofline_seconds: Lower bounds of a GPU program (`roofline.roofline_seconds`); None elsewhere.
      decode_loop: Decode loop of a sampler on a GPU (`roofline.decode_loop_report`); None elsewhere.
    """

    target: str
    num_slices: int
    num_devices: int
    device_kind: str
    program: str
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    compiler_options: dict[str, str]
    fits: bool | None
    peak_gib_per_device: float | None
    hbm_gib_per_device: float | None
    hbm_fraction: float | None
    memory_gib: dict[str, float]
    collectives: dict[str, CollectiveReport]
    compile_seconds: float
    model_flops: float
    step_seconds: dict[str, float] | None
    estimated_mfu: float | None
    estimated_mfu_high: float | None
    roofline_seconds: dict[str, float] | None
    decode_loop: roofline.DecodeLoopReport | None


class Program(NamedTuple):
    """A program to compile and report on.

    Attributes:
      lower: Lowers it; returns a `jax.stages.Lowered`.
      description: What it does.
      mesh: Devices that it runs on.
      batch_size: Rows of the batch.
      parameters: Number of parameters.
      model_flops: Model FLOPs of all devices.
      memory_gib: GiB per device of its arguments, by class.
      resident_gib: GiB on a device before it runs, if that is more than its arguments.
      compiler_options: Options that it is compiled with.
    """

    lower: Callable[[], Any]
    description: str
    mesh: Mesh
    batch_size: int
    parameters: int
    model_flops: float
    memory_gib: dict[str, float]
    resident_gib: float | None = None
    compiler_options: dict[str, str] = {}  # noqa: RUF012  # never changed


def compile_and_report(
    program: Program,
    target: Target,
    hlo_path: str | None = None,
    kernel_flops: Callable[[dict[str, int]], float | None] = lambda kernels: None if kernels else 0.0,
) -> tuple[CompileReport, str]:
    """Compile a program and report on it.

    Args:
      program: The program.
      target: Its devices.
      hlo_path: File for the optimized HLO; None writes none.
      kernel_flops: From the runs of custom kernels by name to their FLOPs on one device; None if unknown.

    Returns:
      The report, without the decode loop, and the optimized HLO, which is empty if the compiler ran out of memory.

    Raises:
      ValueError: For an unknown or invalid compiler option.
    """
    report: CompileReport = {
        "target": target.name,
        "num_slices": target.num_slices,
        "num_devices": len(target.devices),
        "device_kind": target.devices[0].device_kind,
        "program": program.description,
        "mesh": {str(axis): size for axis, size in program.mesh.shape.items()},
        "batch_size": program.batch_size,
        "parameters": program.parameters,
        "compiler_options": program.compiler_options,
        "fits": False,
        "peak_gib_per_device": None,
        "hbm_gib_per_device": target.hbm_gib,
        "hbm_fraction": target.hbm_fraction,
        "memory_gib": program.memory_gib,
        "collectives": {},
        "compile_seconds": 0.0,
        "model_flops": program.model_flops,
        "step_seconds": None,
        "estimated_mfu": None,
        "estimated_mfu_high": None,
        "roofline_seconds": None,
        "decode_loop": None,
    }
    begin = time.monotonic()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (message := compiler_option_error(error)) is not None:
            raise ValueError(message) from None
        if not _is_out_of_memory(str(error)):
            raise
        report["peak_gib_per_device"] = required_gib(str(error))
        report["compile_seconds"] = round(time.monotonic() - begin, 1)
        return report, ""
    report["compile_seconds"] = round(time.monotonic() - begin, 1)
    _add_memory(report, program, compiled.memory_analysis())
    text = compiled.as_text()
    if hlo_path is not None:
        Path(hlo_path).write_text(text, encoding="utf-8")
    costs = hlo.program_costs(text)
    report["collectives"] = {
        kind: {"runs": runs, "gib": size / GIB} for kind, (runs, size) in sorted(costs.collectives.items())
    }
    if target.gpu is not None:
        report["roofline_seconds"] = roofline.roofline_seconds(
            text, target.gpu, len(target.devices), program.model_flops
        )
    else:
        _add_estimate(report, target, costs, kernel_flops(costs.custom_kernels))
    return report, text


def _add_memory(report: CompileReport, program: Program, stats: Any) -> None:
    """Set the memory fields from the compiler's memory analysis."""
    temporaries, code = stats.temp_size_in_bytes / GIB, stats.generated_code_size_in_bytes / GIB
    resident = program.resident_gib
    if resident is None:
        resident = (stats.argument_size_in_bytes - stats.alias_size_in_bytes) / GIB
    peak = resident + stats.output_size_in_bytes / GIB + temporaries + code
    memory = {**program.memory_gib, "temporaries": temporaries, "program": code}
    memory["batch_and_padding"] = max(0.0, peak - sum(memory.values()))
    limit = report["hbm_gib_per_device"]
    report["fits"] = None if limit is None else peak <= limit
    report["peak_gib_per_device"] = peak
    report["memory_gib"] = memory


def _add_estimate(
    report: CompileReport, target: Target, costs: hlo.Costs, kernel_flops: float | None
) -> None:
    """Set the estimates of a TPU program, where the compiler gives cycles and all kernels are known."""
    tpu = target.tpu
    if tpu is None or not costs.cycles or kernel_flops is None:
        return
    link_bytes = {
        kind: size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in costs.collectives.items()
    }
    dcn_seconds = link_bytes.pop("send", 0) / DCN_BANDWIDTH
    compute = costs.cycles / tpu.clock_hz + kernel_flops / (_KERNEL_PEAK_FRACTION * tpu.peak_flops)
    total = compute + sum(link_bytes.values()) / tpu.ici_bandwidth + dcn_seconds
    ideal = report["model_flops"] / (tpu.peak_flops * len(target.devices))
    report["step_seconds"] = {"compute": compute, "compute_and_communication": total}
    report["estimated_mfu"] = ideal / total
    report["estimated_mfu_high"] = ideal / compute


def tree_gib(tree: Any) -> float:
    """Return the GiB of one device's shards of a tree of ShapeDtypeStructs with shardings."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards) / GIB


def _is_out_of_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message or "CompileTimeHbmOom" in message


def required_gib(message: str) -> float | None:
    """Return the GiB that a program needs by an out-of-memory message of the compiler; None if it has no number."""
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    match = re.search(r"[Uu]sed ([\d.]+)([KMGT])(?:iB)? of|\(([\d.]+)([KMGT])(?:iB)?\) exceeds", message)
    return float(match[1] or match[3]) * units[match[2] or match[4]] if match else None


def format_report(report: CompileReport) -> str:
    """Return the report as text for the terminal."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    slices = f" in {report['num_slices']} slices" if report["num_slices"] > 1 else ""
    peak, limit, fraction = (
        report["peak_gib_per_device"],
        report["hbm_gib_per_device"],
        report["hbm_fraction"],
    )
    memory = "more" if peak is None else f"{peak:.2f} GiB"
    memory += f" of {limit:.4g} GiB" if limit else ""
    if fraction and limit:
        memory += f", {fraction:.0%} of the GPU's {limit / fraction:.4g} (XLA_PYTHON_CLIENT_MEM_FRACTION),"
    fits = {True: "fits", False: "DOES NOT FIT", None: "memory of the device is unknown"}[report["fits"]]
    lines = [
        f"target       {report['target']}: {report['num_devices']} x {report['device_kind']}{slices}, mesh {mesh}",
        f"program      {report['program']}",
        f"model        {report['parameters']:,} parameters, batch {report['batch_size']}",
        f"memory       {memory} per device: {fits}",
        *(f"  {name:<26}{size:8.2f} GiB" for name, size in report["memory_gib"].items()),
    ]
    if report["collectives"]:
        lines.append("collectives  per run and device, bytes of the results")
        lines += [
            f"  {kind:<20}{c['runs']:>6} x {c['gib']:10.3f} GiB" for kind, c in report["collectives"].items()
        ]
    lines.append(f"model FLOPs  {report['model_flops']:.3e} on all devices, without recomputation")
    if seconds := report["step_seconds"]:
        low, high = seconds["compute"], seconds["compute_and_communication"]
        lines += [
            f"time         {low:.3g} to {high:.3g} s, an estimate: compiler cycles, links at bandwidth",
            f"MFU          {report['estimated_mfu']:.1%} to {report['estimated_mfu_high']:.1%} of peak, an estimate",
        ]
    if report["roofline_seconds"]:
        lines.append(roofline.format_roofline(report["roofline_seconds"]))
    if report["decode_loop"]:
        lines += roofline.format_decode_loop(report["decode_loop"], report["batch_size"])
    if report["compiler_options"]:
        options = " ".join(f"{name}={value}" for name, value in report["compiler_options"].items())
        lines.append(f"options      {options}")
    lines.append(f"compiled in  {report['compile_seconds']:.1f} s")
    return "\n".join(lines)
