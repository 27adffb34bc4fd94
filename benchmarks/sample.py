"""Codes per second of autoregressive samplers, dalle_jax and others, on the same workload.

    taskset -c 0 python -m benchmarks.sample --batch 1 8 --peers torch llama --peer-python PEERS/bin/python

The workload is a decoder with 8 layers, width 512, 8 heads, an MLP of four times the width and random weights: a
prefill of 256 text tokens, then 16 x 16 codes of 8,192, temperature 1, top-k. Each sampler runs in float32 and in
bfloat16, one after another, each in a process of its own. The result is one Markdown table for each batch: the median
of `--repeats` calls after a warmup, prefill included, the prefill up to the first code and the rate after it, and
below the table the rates over those of the fastest peer, also for the best dtype of each side. The bound reads the
weights and the filled part of the cache once per code, at the memory bandwidth: the fastest of 20 reads of a large
array by a compiled sum on the sampler's cores or GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.report import DTYPES, describe_machine, format_ratios, run_job, speed_ratios

SIZES = {"dim": 512, "layers": 8, "heads": 8, "text_len": 256, "grid": 16, "codes": 8192}
MODELS = ("full", "sparse")
QUANTIZATIONS = ("none", "int8", "fp8", "w8a8")


def time_calls(call, repeats: int) -> list[float]:
    """Return the seconds of `repeats` calls after a warmup call."""
    return time_interleaved([call], repeats)[0]


def time_interleaved(calls, repeats: int) -> list[list[float]]:
    """Time several functions in turn, so that a slow minute of the machine affects all of them."""
    for call in calls:
        call(0)
    seconds = [[] for _ in calls]
    for seed in range(1, repeats + 1):
        for call, times in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call(seed)
            times.append(time.perf_counter() - begin)
    return seconds


def run_dalle_jax(job: dict[str, Any]) -> dict[str, Any]:
    """Time the sampler of dalle_jax.

    In the model `full` every layer reads the whole cache, as in the peers; `sparse` has the layers of the paper.
    Optional entries of the job: `quantization`, and `buckets`, the number of cache sizes.
    """
    import jax
    import jax.numpy as jnp

    from dalle_jax.config import DalleConfig
    from dalle_jax.models import autoregressive, dalle
    from dalle_jax.sampling import generate as sampler
    from dalle_jax.sampling.generate import generate, row_keys
    from dalle_jax.sampling.logits import sample_codes

    sampler.CACHE_BUCKETS = job.get("buckets", sampler.CACHE_BUCKETS)
    attention = (
        {"attention": ("row", "column", "row", "row"), "last_attention": "conv"}
        if job["name"] == "sparse"
        else {"attention": ("full",), "last_attention": None}
    )
    cfg = DalleConfig(
        text_vocab=job["text_len"], text_len=job["text_len"], image_vocab=job["codes"], grid=job["grid"],
        dim=job["dim"], layers=job["layers"], heads=job["heads"], dtype=job["dtype"], **attention,
    )  # fmt: skip
    params = jax.jit(dalle.init, static_argnums=0)(cfg, jax.random.key(0))
    prepare_for_decode = jax.jit(autoregressive.prepare_for_decode, static_argnums=(0, 2))
    params = jax.block_until_ready(prepare_for_decode(cfg, params, job.get("quantization")))
    text = jnp.zeros((job["batch"], job["text_len"]), jnp.int32)
    begin = time.perf_counter()
    args = (text, row_keys(range(job["batch"])))
    program = generate.lower(cfg, params, *args, top_k=job["top_k"]).compile()
    compile_seconds = time.perf_counter() - begin

    def call(seed):
        jax.block_until_ready(program(params, text, row_keys(range(seed, seed + job["batch"]))))

    @jax.jit
    def first(params, text, keys):
        logits, cache = autoregressive.prefill(cfg, params, text)
        return sample_codes(logits, keys, 0, top_k=job["top_k"]), cache

    def call_prefill(seed):
        jax.block_until_ready(first(params, text, row_keys(range(seed, seed + job["batch"]))))

    seconds, prefill = time_interleaved([call, call_prefill], job["repeats"])
    return {"seconds": seconds, "prefill": prefill, "compile": compile_seconds, "version": f"jax {jax.__version__}",
            "device": jax.devices()[0].device_kind}  # fmt: skip


def bandwidth() -> dict[str, Any]:
    """Measure the bytes per second at which compiled sums read 512 MiB, on a GPU 4 GiB, as `bandwidth`.

    Two forms of the sum run ten times each and the fastest run counts, because neither form is the fastest on every
    number of cores: over the whole array, and over the middle axis of 64 blocks with rows of 64 numbers.
    """
    import jax
    import jax.numpy as jnp

    # The launch takes tens of microseconds, a tenth of the time for 512 MiB on a GPU.
    size = 2**27 if jax.default_backend() == "cpu" else 2**30
    seconds = []
    for shape, axis in (((size,), 0), ((64, size // 64**2, 64), 1)):
        x = jnp.ones(shape, jnp.float32)
        total = jax.jit(functools.partial(jnp.sum, axis=axis))
        seconds += time_calls(lambda seed, total=total, x=x: jax.block_until_ready(total(x)), 10)
    return {"bandwidth": 4 * size / min(seconds), "device": jax.devices()[0].device_kind}


def bytes_per_code(job: dict[str, Any]) -> float:
    """Return the bytes per code: the weights once per step of a batch, and keys and values of the text and half the
    image."""
    size = {"float32": 4, "bfloat16": 2}[job["dtype"]]
    weight_size = 1 if job.get("quantization") else size
    d = job["dim"]
    weights = job["layers"] * 12 * d * d + d * job["codes"]
    cache = job["batch"] * job["layers"] * 2 * d * (job["text_len"] + job["grid"] ** 2 / 2)
    return (weight_size * weights + size * cache) / job["batch"]


COLUMNS = (
    "", "dtype", "codes/s", "of the bound", "prefill, s", "codes/s after it", "of the bound", "compilation, s",
    "over the best peer",
)  # fmt: skip


def format_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def measured_row(
    label: str, job: dict[str, Any], result: dict[str, Any], bytes_per_second: float
) -> dict[str, Any]:
    """Return the rates of one sampler and their fractions of the bound.

    Args:
      result: `seconds`, `prefill` and `compile`, from the sampler.
    """
    whole, prefill = (statistics.median(result[name]) for name in ("seconds", "prefill"))
    codes, bound = job["batch"] * job["grid"] ** 2, bytes_per_second / bytes_per_code(job)
    rate, decode_rate = codes / whole, (codes - job["batch"]) / (whole - prefill)
    return {
        "label": label, "dtype": job["dtype"], "rate": rate, "of_bound": rate / bound, "prefill": prefill,
        "decode_rate": decode_rate, "decode_of_bound": decode_rate / bound, "compile": result["compile"],
    }  # fmt: skip


def cells_of(row: dict[str, Any], peer_rates: dict[str, float] | None) -> list[str]:
    """Return the cells of a row.

    Args:
      peer_rates: Dtype -> rate of the fastest peer; None for a peer.
    """
    peer = (peer_rates or {}).get(row["dtype"])
    return [
        row["label"], row["dtype"], f"{row['rate']:.1f}", f"{row['of_bound']:.0%}", f"{row['prefill']:.3f}",
        f"{row['decode_rate']:.1f}", f"{row['decode_of_bound']:.0%}", f"{row['compile']:.1f}",
        f"{row['rate'] / peer:.2f}" if peer else "",
    ]  # fmt: skip


def measure_batch(args: argparse.Namespace, job: dict[str, Any], bytes_per_second: float) -> list[str]:
    """Measure all samplers at one batch size, print the table row by row, and return the samplers' versions.

    Args:
      job: The workload with its batch.
    """
    print("\n" + format_row(COLUMNS) + "\n" + format_row(["---"] * len(COLUMNS)), flush=True)
    peer_rates: dict[str, float] = {}
    rates: dict[str, dict[str, float]] = {}
    versions = []
    samplers = [(None, name) for name in args.peers]
    samplers += itertools.product(args.quantization, args.models)
    for (quantization, name), dtype in itertools.product(samplers, args.dtypes):
        is_peer = quantization is None
        this = {**job, "name": name, "dtype": dtype}
        this["quantization"] = None if quantization == "none" else quantization
        label = name if is_peer else f"dalle_jax, {name} {this['quantization'] or ''}".rstrip()
        if is_peer:
            result = run_job(args.peer_python, "benchmarks.peers", this)
        else:
            result = run_job(sys.executable, "benchmarks.sample", this)
        if isinstance(result, str):
            failed = [label, dtype, f"failed: {result}", *[""] * (len(COLUMNS) - 3)]
            print(format_row(failed), flush=True)
            continue
        versions.append(result["version"])
        row = measured_row(label, this, result, bytes_per_second)
        if is_peer:
            peer_rates[dtype] = max(peer_rates.get(dtype, 0.0), row["rate"])
        else:
            rates.setdefault(label, {})[dtype] = row["rate"]
        print(format_row(cells_of(row, None if is_peer else peer_rates)), flush=True)
    compared = {label: ours for label, ours in rates.items() if speed_ratios(ours, peer_rates)}
    if compared:
        print(f"\nBatch {job['batch']}, codes per second over the fastest peer:\n")
    for label, ours in compared.items():
        print(f"- {label}: {format_ratios(ours, peer_rates)}.", flush=True)
    return versions


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="of dalle_jax")
    parser.add_argument("--peers", nargs="*", default=[], help="names in benchmarks/peers.py")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument(
        "--quantization", nargs="*", choices=QUANTIZATIONS, default=["none"], help="of dalle_jax"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.job is not None:
        job = json.loads(args.job)
        print(json.dumps(bandwidth() if job["name"] == "bandwidth" else run_dalle_jax(job)))
        return
    measured = run_job(sys.executable, "benchmarks.sample", {"name": "bandwidth"})
    if isinstance(measured, str):
        sys.exit(f"benchmarks.sample: error: {measured}")
    bytes_per_second = measured["bandwidth"]
    sizes = {name: getattr(args, name) for name in (*SIZES, "top_k", "repeats")}
    print(f"{describe_machine(measured['device'])}; a sum reads {bytes_per_second / 1e9:.1f} GB/s")
    print(", ".join(f"{name} {value}" for name, value in sizes.items()), flush=True)
    versions = []
    for batch in args.batch:
        versions += measure_batch(args, {**sizes, "batch": batch}, bytes_per_second)
    print(f"\n{', '.join(dict.fromkeys(versions))}")


if __name__ == "__main__":
    main()
