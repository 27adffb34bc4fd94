"""Codes per second of our sampler and of others, the same work for all, one after another in one run.

    taskset -c 0 python -m benchmarks.sample --batch 1 8 --peers torch llama --peer-python PEERS/bin/python

The work: a decoder of 8 layers, width 512, 8 heads and an MLP of four times the width, random weights, 256 text
tokens of prefill, then 16 x 16 codes of 8,192, temperature 1, top-k. Each sampler runs in a process of its own, warm;
the median of `--repeats` whole calls counts, prefill included; beside it stand the prefill alone, up to the first code,
and the codes per second after it. The bound is what reading the weights and the filled part of the cache once per code
would take at the bandwidth that a sum over a large array reaches.
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
OURS = ("full", "sparse")
WEIGHTS = ("whole", "int8", "fp8", "w8a8")


def timed(call, repeats: int) -> list[float]:
    """Seconds of calls after a first one."""
    return in_turn([call], repeats)[0]


def in_turn(calls, repeats: int) -> list[list[float]]:
    """The same of several calls, one after another in each round, so that a slow minute of the machine hits all."""
    for call in calls:
        call(0)
    found = [[] for _ in calls]
    for seed in range(1, repeats + 1):
        for call, seconds in zip(calls, found, strict=True):
            begin = time.perf_counter()
            call(seed)
            seconds.append(time.perf_counter() - begin)
    return found


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """kind `full`: every layer reads the whole cache, as the peers do; `sparse`: the paper's layers. Beside that, where
    the job says so, `weights` in 8 bits and other `buckets` than the sampler's own."""
    import jax
    import jax.numpy as jnp

    from dalle_jax.config import DalleConfig
    from dalle_jax.models import autoregressive, dalle
    from dalle_jax.sampling import generate as sampler
    from dalle_jax.sampling.generate import generate, row_keys
    from dalle_jax.sampling.logits import sample_codes

    sampler.CACHE_BUCKETS = job.get("buckets", sampler.CACHE_BUCKETS)
    kinds = (
        {"attention": ("row", "column", "row", "row"), "last_attention": "conv"}
        if job["name"] == "sparse"
        else {"attention": ("full",), "last_attention": None}
    )
    cfg = DalleConfig(
        text_vocab=job["text_len"], text_len=job["text_len"], image_vocab=job["codes"], grid=job["grid"],
        dim=job["dim"], layers=job["layers"], heads=job["heads"], dtype=job["dtype"], **kinds,
    )  # fmt: skip
    params = jax.jit(dalle.init, static_argnums=0)(cfg, jax.random.key(0))
    prepare_for_decode = jax.jit(autoregressive.prepare_for_decode, static_argnums=(0, 2))
    params = jax.block_until_ready(prepare_for_decode(cfg, params, job.get("weights")))
    text = jnp.zeros((job["batch"], job["text_len"]), jnp.int32)
    before = time.perf_counter()
    args = (text, row_keys(range(job["batch"])))
    program = generate.lower(cfg, params, *args, top_k=job["top_k"]).compile()
    compiled = time.perf_counter() - before

    def call(seed):
        jax.block_until_ready(program(params, text, row_keys(range(seed, seed + job["batch"]))))

    @jax.jit
    def first(params, text, keys):
        logits, cache = autoregressive.prefill(cfg, params, text)
        return sample_codes(logits, keys, 0, top_k=job["top_k"]), cache

    def begin(seed):
        jax.block_until_ready(first(params, text, row_keys(range(seed, seed + job["batch"]))))

    seconds, prefill = in_turn([call, begin], job["repeats"])
    return {"seconds": seconds, "prefill": prefill, "compile": compiled, "version": f"jax {jax.__version__}",
            "device": jax.devices()[0].device_kind}  # fmt: skip


def bandwidth() -> float:
    """Bytes per second that a sum over 512 MiB, on a GPU 4 GiB, reads, best of five."""
    import jax
    import jax.numpy as jnp

    # A call takes tens of microseconds to start: of 512 MiB on a GPU that would be a tenth.
    size = 2**27 if jax.default_backend() == "cpu" else 2**30
    big = jnp.ones((size,), jnp.float32)
    total = jax.jit(lambda x: jnp.dot(x, x))
    return big.nbytes / min(timed(lambda seed: jax.block_until_ready(total(big)), 5))


def bytes_per_code(job: dict[str, Any]) -> float:
    """Weights once per step of a batch, and for each row the keys and values of half of the picture and the text."""
    size = {"float32": 4, "bfloat16": 2}[job["dtype"]]
    stored = 1 if job.get("weights") else size
    d = job["dim"]
    weights = job["layers"] * 12 * d * d + d * job["codes"]
    cache = job["batch"] * job["layers"] * 2 * d * (job["text_len"] + job["grid"] ** 2 / 2)
    return (stored * weights + size * cache) / job["batch"]


def child(python: str, module: str, job: dict[str, Any]) -> dict[str, Any] | str:
    """Runs one sampler by itself. Returns what it printed last, or why it did not run."""
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
    parser.add_argument("--ours", nargs="*", choices=OURS, default=list(OURS))
    parser.add_argument("--peers", nargs="*", default=[], help="of benchmarks/peers.py")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--weights", nargs="*", choices=WEIGHTS, default=["whole"], help="of ours")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        job = json.loads(args.job)
        print(json.dumps({"bandwidth": bandwidth()} if job["name"] == "bandwidth" else ours(job)))
        return
    job = {n: getattr(args, n) for n in (*SIZES, "dtype", "top_k", "repeats")}
    read = child(sys.executable, "benchmarks.sample", {"name": "bandwidth"})["bandwidth"]
    print(
        f"a sum reads {read / 1e9:.1f} GB/s; {args.dtype}, cores {sorted(os.sched_getaffinity(0))}",
        flush=True,
    )
    for batch in args.batch:
        job["batch"] = batch
        rates = {}
        asked = itertools.product(args.weights, args.ours)
        for weights, name in [*((None, name) for name in args.peers), *asked]:
            mine = weights is not None
            this = {**job, "name": name, "weights": None if weights == "whole" else weights}
            bound = read / bytes_per_code(this)
            module = "benchmarks.sample" if mine else "benchmarks.peers"
            found = child(sys.executable if mine else args.peer_python, module, this)
            label = f"dalle_jax, {name}" if mine else name
            label += f" {weights}" if this["weights"] else ""
            if isinstance(found, str):
                print(f"batch {batch:3d}  {label:24s} did not run: {found}", flush=True)
                continue
            whole, prefill = (statistics.median(found[name]) for name in ("seconds", "prefill"))
            codes = batch * job["grid"] ** 2
            rate, after = codes / whole, (codes - batch) / (whole - prefill)
            if not mine:
                rates[name] = rate
            best = f"{rate / max(rates.values()):5.2f} x best peer" if mine and rates else ""
            print(
                f"batch {batch:3d}  {label:24s} {rate:9.1f} codes/s  {rate / bound:4.0%} of the bound; "
                f"prefill {prefill:.3f} s, then {after:9.1f} codes/s, {after / bound:4.0%}; "
                f"compiled in {found['compile']:5.1f} s  {found['version']} {best}",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
