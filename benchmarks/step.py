"""Speed and MFU of one training step: python -m benchmarks.step CONFIG.py [--field value ...]

The step is the one that training runs, on the attached devices, with random rows that are in device memory already, so
that reading data costs nothing. The result has seconds per step, rows and tokens per second, model FLOP/s
(train/flops.py) and MFU, against the peak of dense bf16 products by the data sheet.

    python -m benchmarks.step configs/dalle_12b.py --model.dim 2048 --model.layers 24 --model.heads 32 \
        --data.batch-size 32 --trace step_trace                                       # 1.3 B on one GPU
    python -m benchmarks.step configs/ddpm_cifar10.py --peer-python PEERS/bin/python
    python -m benchmarks.step configs/dvae_openai.py

--steps N      timed steps (20), after two warmup steps
--trace DIR    directory for a profile of three more steps, for XProf or TensorBoard
--peer-python  Python with torch and diffusers, which trains an equal U-Net on the same device afterwards
--json         print one JSON object to standard output
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from dalle_jax.aot.training_step import step_and_arguments
from dalle_jax.cli.train import parse_train_args
from dalle_jax.config import DiffusionConfig, TrainConfig
from dalle_jax.parallel.devices import peak_flops
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding
from dalle_jax.train.flops import train_flops
from dalle_jax.train.state import check_batch, init_state, task_optimizer
from dalle_jax.train.tasks import make_task

WARMUP_STEPS = 2


def random_rows(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Return a batch that every stage accepts: pixels of all 256 levels, ids below 8."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256 if leaf.dtype == np.uint8 else 8, leaf.shape, leaf.dtype)
        for name, leaf in shapes.items()
    }


def measure_step(config: TrainConfig, steps: int, trace: str | None) -> dict[str, Any]:
    """Time `steps` training steps and return the report."""
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    with jax.set_mesh(mesh):
        task = make_task(config)
        flops = train_flops(task)
        step, (_, frozen, batch) = step_and_arguments(config, mesh)
        if frozen:
            sys.exit("the stage has frozen parameters; its configuration alone does not define the step")
        state = init_state(task, task_optimizer(task), mesh)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        rows = jax.device_put(random_rows(batch), batch_sharding(mesh))
        begin = time.perf_counter()
        step_fn = step.lower(state, {}, rows).compile()
        compile_seconds = time.perf_counter() - begin

        def run(count: int) -> list[float]:
            nonlocal state
            times = []
            for _ in range(count):
                begin = time.perf_counter()
                state, metrics = step_fn(state, {}, rows)
                finite = bool(metrics["finite"])  # waits
                times.append(time.perf_counter() - begin)
                if not finite:
                    sys.exit(f"the loss is not finite: {metrics['loss']}")
            return times

        run(WARMUP_STEPS)
        seconds = statistics.median(run(steps))
        if trace:
            with jax.profiler.trace(trace):
                run(3)
    kind = mesh.devices.flat[0].device_kind
    peak = peak_flops(kind)
    stats = mesh.devices.flat[0].memory_stats() if mesh.devices.flat[0].platform != "cpu" else None
    return {
        "device": kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "parameters": parameters,
        "batch": config.data.batch_size,
        "seconds_per_step": seconds,
        "rows_per_second": config.data.batch_size / seconds,
        "tokens_per_second": config.data.batch_size * getattr(config.model, "seq_len", 0) / seconds or None,
        "flops_per_step": flops,
        "mfu": flops / seconds / (peak * mesh.size) if flops and peak else None,
        "peak_gib": stats["peak_bytes_in_use"] / 2**30 if stats else None,
        "compile_seconds": compile_seconds,
    }


def peer_job(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Return the network of a configuration for benchmarks/step_peer.py.

    Raises:
      ValueError: If diffusers does not have this network.
    """
    model = config.model
    if not isinstance(model, DiffusionConfig):
        raise ValueError(f"--peer-python trains the U-Net of diffusion, not stage {model.kind}")
    if (
        model.text
        or model.num_classes
        or model.codes
        or model.low_res_size
        or model.patch_size != 1
        or model.scale_shift_norm
    ):
        raise ValueError("--peer-python trains a U-Net without conditions, patches and scale_shift_norm")
    names = ("image_size", "width", "channel_multipliers", "blocks", "attention_sizes", "dropout", "dtype")
    groups = {"groups": model.norm_groups or 32}
    return {name: getattr(model, name) for name in names} | groups | {
        "batch": config.data.batch_size, "steps": steps, "warmup_steps": WARMUP_STEPS,
    }  # fmt: skip


def format_report(report: dict[str, Any]) -> str:
    """Return the report as text for the terminal."""
    lines = [f"{report['devices']} x {report['device']}, jax {report['jax']}, {report['parameters']:,} parameters, "
             f"batch {report['batch']}; compiled in {report['compile_seconds']:.1f} s"]  # fmt: skip
    line = f"dalle_jax  {report['seconds_per_step']:.4f} s/step  {report['rows_per_second']:.1f} rows/s"
    if report["tokens_per_second"]:
        line += f"  {report['tokens_per_second']:,.0f} tokens/s"
    if report["flops_per_step"]:
        line += f"  {report['flops_per_step'] / report['seconds_per_step'] / 1e12:.3g} model TFLOP/s"
    if report["mfu"]:
        line += f", {report['mfu']:.1%} of peak"
    if report["peak_gib"]:
        line += f"  {report['peak_gib']:.2f} GiB"
    lines.append(line)
    if peer := report.get("peer"):
        ratio = report["rows_per_second"] / peer["rows_per_second"]
        lines.append(
            f"peer       {peer['seconds_per_step']:.4f} s/step  {peer['rows_per_second']:.1f} rows/s  "
            f"{peer['parameters']:,} parameters, {peer['peer']}: dalle_jax is {ratio:.2f} times as fast"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trace")
    parser.add_argument("--peer-python")
    parser.add_argument("--json", action="store_true")
    args, rest = parser.parse_known_args(argv)
    if not rest or rest[0].startswith("-"):
        parser.error("the first argument is a configuration: python -m benchmarks.step configs/X.py")
    try:
        config = parse_train_args(rest, "benchmarks.step").config
        job = peer_job(config, args.steps) if args.peer_python else None
        report = measure_step(config, args.steps, args.trace)
    except (ValueError, OSError) as error:
        print(f"benchmarks.step: error: {error}", file=sys.stderr)
        return 2
    if job:
        command = [args.peer_python, "-m", "benchmarks.step_peer", json.dumps(job)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        report["peer"] = json.loads(answer.splitlines()[-1])
    print(format_report(report), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
