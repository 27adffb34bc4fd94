"""Roofline of a compiled GPU program: matrix products at peak, memory and links at their published bandwidth.

The GPU compiler gives no cycles, so there is a lower bound and no estimate of the time. It follows from the compiled
program and data sheets alone. Launch overhead, idle time and kernels below the memory bandwidth make a run slower; data
found in the caches of the chip makes it faster.
"""

from __future__ import annotations

from typing import TypedDict

from dalle_jax.aot import hlo
from dalle_jax.aot.gpu_kernels import (
    KernelKind,
    find_loops,
    kernel_bytes_accessed,
    kernel_collective_bytes,
    list_kernels,
)
from dalle_jax.aot.gpu_targets import Gpu

_DECODE_SCOPE = "/decode/"  # named scope of the decode loop in sampling/generate.py


class DecodeLoopReport(TypedDict):
    """Work of one pass of the decode loop, which gives each image of the batch one code.

    Attributes:
      kernels: Kernels by kind; fractions if several loops differ.
      bytes_read: Bytes that all kernels read.
      bytes_written: Bytes that all kernels write.
      minimum_bytes: Bytes that any implementation must read.
      codes_per_second: Upper bound by the memory bandwidth; None if it is unknown.
    """

    kernels: dict[str, float]
    bytes_read: float
    bytes_written: float
    minimum_bytes: float
    codes_per_second: float | None


def roofline_seconds(text: str, gpu: Gpu, num_devices: int, model_flops: float) -> dict[str, float]:
    """Return lower bounds of the time of one run of a program.

    Args:
      text: Its optimized HLO.
      gpu: Device that it runs on.
      num_devices: Number of these devices.
      model_flops: Model FLOPs of all devices together.

    Returns:
      Seconds of `products` at peak FLOP/s, of `memory` traffic of all kernels and of `links` for the bytes that a
      device receives in collectives. The largest is the bound.
    """
    entry, computations = hlo.parse_computations(text)
    kernels = list_kernels(computations, entry)
    return {
        "products": model_flops / (gpu.peak_flops * num_devices),
        "memory": kernel_bytes_accessed(kernels) / gpu.memory_bandwidth,
        "links": kernel_collective_bytes(kernels, num_devices) / gpu.link_bandwidth,
    }


def decode_loop_report(
    text: str, gpu: Gpu | None, batch_size: int, minimum_bytes: float
) -> DecodeLoopReport | None:
    """Return the work of one pass of the decode loop.

    Args:
      text: Optimized HLO of the sampler.
      gpu: Device that it runs on; None if its bandwidth is unknown.
      batch_size: Images of the program.
      minimum_bytes: Bytes that a pass must read.

    Returns:
      The report, or None if the program has no decode loop.
    """
    loops = [loop for loop in find_loops(text) if _DECODE_SCOPE in loop.scope and loop.trip_count]
    passes = sum(loop.trip_count or 0 for loop in loops)
    if not passes:
        return None
    kernels = [k._replace(runs=k.runs * (loop.trip_count or 0)) for loop in loops for k in loop.kernels]

    def count(kind: KernelKind) -> float:
        return sum(kernel.runs for kernel in kernels if kernel.kind == kind) / passes

    rate = (
        None if gpu is None else batch_size * gpu.memory_bandwidth * passes / kernel_bytes_accessed(kernels)
    )
    return {
        "kernels": {
            "fusions": count("fusion"),
            "library_calls": count("library_call"),
            "copies": count("copy"),
            "others": count("other"),
        },
        "bytes_read": sum(kernel.runs * kernel.bytes_read for kernel in kernels) / passes,
        "bytes_written": sum(kernel.runs * kernel.bytes_written for kernel in kernels) / passes,
        "minimum_bytes": minimum_bytes,
        "codes_per_second": rate,
    }


def format_roofline(seconds: dict[str, float]) -> str:
    """Return the line of a report for the result of `roofline_seconds`."""
    parts = ", ".join(f"{name} {value:.3g}" for name, value in seconds.items())
    return f"time         at least {max(seconds.values()):.3g} s by the data sheet ({parts}); a bound, not measured"


def format_decode_loop(loop: DecodeLoopReport, batch_size: int) -> list[str]:
    """Return the lines of a report for the decode loop of a batch."""
    kernels, minimum = loop["kernels"], loop["minimum_bytes"]
    ratio = (loop["bytes_read"] + loop["bytes_written"]) / minimum
    counts = ", ".join(f"{n:.4g} {name.replace('_', ' ')}" for name, n in kernels.items() if n)
    read, written, needed = (n / 1e6 for n in (loop["bytes_read"], loop["bytes_written"], minimum))
    lines = [
        f"decode loop  {sum(kernels.values()):.4g} kernels per pass of {batch_size} codes: {counts}",
        f"  reads {read:,.1f} MB and writes {written:,.1f} MB per pass: {ratio:.2f} times the minimum of "
        f"{needed:,.1f} MB, "
        "the weights and the visible part of the caches",
    ]
    if rate := loop["codes_per_second"]:
        lines.append(
            f"  at most {rate:,.0f} codes/s at the memory bandwidth, {rate * ratio:,.0f} with the minimum traffic: "
            "bounds, not measured"
        )
    return lines
