"""Codes per second of autoregressive samplers, dalle_jax and others, on the same workload.

    taskset -c 0 python -m benchmarks.sample --batch 1 8 --peers torch llama --peer-python PEERS/bin/python

The workload is a decoder with 8 layers, width 512, 8 heads, an MLP of four times the width and random weights: a
prefill of 256 text tokens, then 16 x 16 codes of 8,192, temperature 1, top-k. The samplers run one after another, each
in a process of its own. The result is the median of `--repeats` calls after a warmup, prefill included, with the
prefill up to the first code and the rate after it. The bound reads the weights and the filled part of the cache once
per code, at the bandwidth that a sum over a large array reaches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


def bandwidth() -> float:
    """Return the bytes per second of a sum over 512 MiB, on a GPU 4 GiB, the best of five."""
    import jax
    import jax.numpy as jnp

    # The launch takes tens of microseconds, a tenth of the time for 512 MiB on a GPU.
    size = 2**27 if jax.default_backend() == "cpu" else 2**30
    big = jnp.ones((size,), jnp.float32)
    total = jax.jit(lambda x: jnp.dot(x, x))
    return big.nbytes / min(time_calls(lambda seed: jax.block_until_ready(total(big)), 5))


def bytes_per_code(job: dict[str, Any]) -> float:
    """Return the bytes per code: the weights once per step of a batch, and keys and values of the text and half the
    image."""
    size = {"float32": 4, "bfloat16": 2}[job["dtype"]]
    weight_size = 1 if job.get("quantization") else size
    d = job["dim"]
    weights = job["layers"] * 12 * d * d + d * job["codes"]
    cache = job["batch"] * job["layers"] * 2 * d * (job["text_len"] + job["grid"] ** 2 / 2)
    return (weight_size * weights + size * cache) / job["batch"]


def run_job(python: str, module: str, job: dict[str, Any]) -> dict[str, Any] | str:
    """Run one sampler in a process of its own and return its result, or the last line of its error message."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [python, "-m", module, "--job", json.dumps(job)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="of dalle_jax")
    parser.add_argument("--peers", nargs="*", default=[], help="names in benchmarks/peers.py")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument(
        "--quantization", nargs="*", choices=QUANTIZATIONS, default=["none"], help="of dalle_jax"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        job = json.loads(args.job)
        print(json.dumps({"bandwidth": bandwidth()} if job["name"] == "bandwidth" else run_dalle_jax(job)))
        return
    job = {n: getattr(args, n) for n in (*SIZES, "dtype", "top_k", "repeats")}
    measured = run_job(sys.executable, "benchmarks.sample", {"name": "bandwidth"})
    if isinstance(measured, str):
        sys.exit(f"benchmarks.sample: error: {measured}")
    bytes_per_second = measured["bandwidth"]
    print(
        f"a sum reads {bytes_per_second / 1e9:.1f} GB/s; {args.dtype}, cores {sorted(os.sched_getaffinity(0))}",
        flush=True,
    )
    for batch in args.batch:
        job["batch"] = batch
        peer_rates = []
        models = list(itertools.product(args.quantization, args.models))
        for quantization, name in [*((None, name) for name in args.peers), *models]:
            is_peer = quantization is None
            this = {**job, "name": name, "quantization": None if quantization == "none" else quantization}
            bound = bytes_per_second / bytes_per_code(this)
            if is_peer:
                result = run_job(args.peer_python, "benchmarks.peers", this)
            else:
                result = run_job(sys.executable, "benchmarks.sample", this)
            label = name if is_peer else f"dalle_jax, {name} {this['quantization'] or ''}"
            if isinstance(result, str):
                print(f"batch {batch:3d}  {label:24s} failed: {result}", flush=True)
                continue
            whole, prefill = (statistics.median(result[name]) for name in ("seconds", "prefill"))
            codes = batch * job["grid"] ** 2
            rate, decode_rate = codes / whole, (codes - batch) / (whole - prefill)
            if is_peer:
                peer_rates.append(rate)
            ratio = f"{rate / max(peer_rates):5.2f} x best peer" if peer_rates and not is_peer else ""
            print(
                f"batch {batch:3d}  {label:24s} {rate:9.1f} codes/s  {rate / bound:4.0%} of the bound; "
                f"prefill {prefill:.3f} s, then {decode_rate:9.1f} codes/s, {decode_rate / bound:4.0%}; "
                f"compiled in {result['compile']:5.1f} s  {result['version']} {ratio}",
                flush=True,
            )


if __name__ == "__main__":
    main()
