"""What a compiled GPU program cannot be faster than: products at the peak, memory and links at their published rates.

The GPU compiler gives no cycles, so there is no estimate of its time, only what stands against it. All of it follows
from the compiled program and data sheets, none from a run: launches, waiting and kernels that reach less than the
memory's rate come on top, and what a kernel finds in the cache of the chip comes off.
"""

from __future__ import annotations

from typing import Any

from dalle_jax.aot import hlo
from dalle_jax.aot.gpu_kernels import Kernel, bytes_accessed, collective_bytes, find_loops, kernels
from dalle_jax.aot.gpu_targets import Gpu

Report = dict[str, Any]


def roofline_seconds(text: str, gpu: Gpu, devices: int, flops: float) -> dict[str, float]:
    """Seconds of one run of the program whose optimized HLO is `text`: `products` of the model at the peak, `memory`
    for what all kernels read and write, `links` for what collectives bring to a device; the longest is the bound.

    flops: of all devices.
    """
    entry, found = hlo.computations(text)
    every = kernels(found, entry)
    return {
        "products": flops / (gpu.flops * devices),
        "memory": bytes_accessed(every) / gpu.bandwidth,
        "links": collective_bytes(every, devices) / gpu.link,
    }


def decode_loop_report(text: str, gpu: Gpu | None, rows: int, least: float) -> Report | None:
    """The loop that draws codes, per pass, which gives each of `rows` pictures one code; None where there is none.

    least: bytes that a pass must read. Returns `kernels` by sort (fractions where loops differ), `read_bytes`,
    `written_bytes`, `minimum_bytes`, and `codes_per_second`, the bound by the bandwidth of the memory, None where that is
    not known.
    """
    held = [loop for loop in find_loops(text) if "/decode/" in loop.scope and loop.trips]
    passes = sum(loop.trips for loop in held)
    if not passes:
        return None
    every = [k._replace(runs=k.runs * loop.trips) for loop in held for k in loop.kernels]

    def count(sort: str) -> float:
        return sum(k.runs for k in every if k.sort == sort) / passes

    return {
        "kernels": {
            "fusions": count("fusion"),
            "library_calls": count("call"),
            "copies": count("copy"),
            "others": count("other"),
        },
        "read_bytes": _sum(every, "read") / passes,
        "written_bytes": _sum(every, "written") / passes,
        "minimum_bytes": least,
        "codes_per_second": None if gpu is None else rows * gpu.bandwidth * passes / bytes_accessed(every),
    }


def _sum(every: list[Kernel], field: str) -> float:
    return sum(kernel.runs * getattr(kernel, field) for kernel in every)


def format_loop_report(report: Report) -> list[str]:
    """The lines of a report (compile_report.py) that are about this."""
    lines = []
    if seconds := report["roofline_seconds"]:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in seconds.items())
        lines.append(
            f"time         at least {max(seconds.values()):.3g} s by the data sheet ({parts}); not a run"
        )
    if loop := report["decoding"]:
        found, least = loop["kernels"], loop["minimum_bytes"]
        ratio = (loop["read_bytes"] + loop["written_bytes"]) / least
        parts = ", ".join(f"{n:.4g} {name.replace('_', ' ')}" for name, n in found.items() if n)
        read, written, needed = (loop[f"{name}_bytes"] / 1e6 for name in ("read", "written", "minimum"))
        lines += [
            f"decode loop  {sum(found.values()):.4g} kernels a pass of {report['batch']} codes: {parts}",
            f"  reads {read:,.1f} MB, writes {written:,.1f} MB a pass: {ratio:.2f} times the least, {needed:,.1f} MB, "
            "of weights and what is seen of the caches",
        ]
        if rate := loop["codes_per_second"]:
            lines.append(
                f"  at most {rate:,.0f} codes/s at the memory's rate, {rate * ratio:,.0f} were it the least: "
                "an estimate from the program, not a run"
            )
    return lines
