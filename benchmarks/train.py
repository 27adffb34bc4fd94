"""Speed of one training step, ours and PyTorch's: python -m benchmarks.train CONFIG [--field value ...]

The step is the one that training runs, on the attached devices, with random rows that are in device memory already, so
that reading data costs nothing. With --peer-python, PyTorch trains an equal network on the same machine
(benchmarks/train_peer.py): a Transformer, a discrete VAE, or a U-Net without conditions. Each step is measured in a
process of its own, one after another. The result is a Markdown table: seconds per step, rows per second, model FLOP/s
(train/flops.py), on known accelerators their fraction of the peak of dense bf16 products by the data sheet, and the
peers' times over ours.

    python -m benchmarks.train configs/dalle_12b.py --model.dim 2048 --model.layers 24 --model.heads 32 \
        --data.batch-size 32 --dtypes bfloat16 --trace step_trace                     # 1.3 B on one GPU
    python -m benchmarks.train configs/ddpm_cifar10.py --peer-python PEERS/bin/python
    python -m benchmarks.train configs/dvae_openai.py

--dtypes       compute dtypes, in place of the configuration's (float32 and bfloat16)
--steps N      timed steps (20), after two warmup steps
--trace DIR    directory for profiles of three more of our steps, one for each dtype, for XProf or TensorBoard
--peer-python  Python with torch, and with diffusers for the U-Net
--json         print one JSON object to standard output
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.report import DTYPES, describe_machine, format_ratios, run_job, speed_ratios
from dalle_jax.aot.training_step import training_step_and_arguments
from dalle_jax.cli.train import parse_train_args
from dalle_jax.config import TrainConfig
from dalle_jax.parallel.devices import peak_flops
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding
from dalle_jax.train.flops import train_flops
from dalle_jax.train.state import check_batch, init_state, shardings_of, task_optimizer
from dalle_jax.train.tasks import make_task

WARMUP_STEPS = 2
# Values of the fields that the peer does not have in another form.
PEER_OPTIM: dict[str, tuple[Any, ...]] = {"optimizer": ("adamw",), "grad_accum_steps": (1,)}
PEER_MODELS: dict[str, dict[str, tuple[Any, ...]]] = {
    "dalle": {
        "activation": ("gelu-tanh", "gelu"), "norm": ("layer",), "sandwich_norm": (False,), "biases": (True,),
        "pos_embed": ("axial", "learned"), "text_encoder": (None,), "second_final_norm": (False,),
        "shift_masks": (False,),
    },
    "dvae": {},
    "diffusion": {
        "text": (None,), "num_classes": (0,), "codes": (None,), "low_res_size": (0,), "patch_size": (1,),
        "scale_shift_norm": (False,), "head_dim": (None,), "resample": ("conv",),
    },
}  # fmt: skip


def random_rows(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Return a batch that every stage accepts: pixels of all 256 levels, ids below 8."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256 if leaf.dtype == np.uint8 else 8, leaf.shape, leaf.dtype)
        for name, leaf in shapes.items()
    }


def time_steps(config: TrainConfig, steps: int, trace: str | None) -> dict[str, Any]:
    """Time `steps` training steps and return the report."""
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    with jax.set_mesh(mesh):
        task = make_task(config)
        flops = train_flops(task)
        step, (_, frozen, batch) = training_step_and_arguments(config, mesh)
        frozen = jax.device_put(task.frozen, shardings_of(frozen))
        state = init_state(task, task_optimizer(task), mesh)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        rows = jax.device_put(random_rows(batch), batch_sharding(mesh))
        begin = time.perf_counter()
        step_fn = step.lower(state, frozen, rows).compile()
        compile_seconds = time.perf_counter() - begin

        def run(count: int) -> list[float]:
            nonlocal state
            times = []
            for _ in range(count):
                begin = time.perf_counter()
                state, metrics = step_fn(state, frozen, rows)
                finite = bool(metrics["finite"])  # waits
                times.append(time.perf_counter() - begin)
                if not finite:
                    sys.exit(f"Expected a finite loss, got {metrics['loss']}.")
            return times

        run(WARMUP_STEPS)
        seconds = run(steps)
        if trace:
            with jax.profiler.trace(trace):
                run(3)
    device = mesh.devices.flat[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return {
        "device": device.device_kind,
        "devices": mesh.size,
        "version": f"jax {jax.__version__}",
        "parameters": parameters,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "flops_per_step": flops,
        "tokens_per_row": getattr(config.model, "seq_len", None),
        "peak_gib": stats["peak_bytes_in_use"] / 2**30 if stats else None,
    }


def peer_job(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Return the job of benchmarks/train_peer.py for a configuration, without its number of parameters.

    Raises:
      ValueError: If the peer does not have this network or this optimizer.
    """
    model, optim = config.model, config.optim
    if model.kind not in PEER_MODELS:
        raise ValueError(f"Expected a model of {', '.join(PEER_MODELS)} for --peer-python, got {model.kind}.")
    for name, section, values in (("model", model, PEER_MODELS[model.kind]), ("optim", optim, PEER_OPTIM)):
        for field, expected in values.items():
            if (value := getattr(section, field)) not in expected:
                expected = " or ".join(map(str, expected))
                raise ValueError(f"Expected {name}.{field} {expected} for --peer-python, got {value}.")
    derived = {name: getattr(model, name) for name in ("mlp_dim", "num_text_ids") if hasattr(model, name)}
    return {
        "model": dataclasses.asdict(model) | derived, "optim": dataclasses.asdict(optim), "dtype": model.dtype,
        "batch": config.data.batch_size, "steps": steps, "warmup_steps": WARMUP_STEPS,
    }  # fmt: skip


def report_row(
    side: str, dtype: str, batch: int, result: dict[str, Any] | str, ours: dict[str, Any]
) -> dict[str, Any]:
    """Return a row of the report.

    Args:
      result: Result of the measurement, or its error message.
      ours: Our result for this dtype, with the model FLOPs of both sides.
    """
    row: dict[str, Any] = {"side": side, "dtype": dtype}
    if isinstance(result, str):
        return row | {"error": result}
    median, flops = statistics.median(result["seconds"]), ours["flops_per_step"]
    peak = peak_flops(ours["device"])
    tokens = ours["tokens_per_row"]
    return row | result | {
        "median_seconds": median,
        "min_seconds": min(result["seconds"]),
        "rows_per_second": batch / median,
        "tokens_per_second": batch * tokens / median if tokens else None,
        "model_tflops": flops / median / 1e12 if flops else None,
        "mfu": flops / median / (peak * ours["devices"]) if flops and peak else None,
    }  # fmt: skip


def rates_of(rows: list[dict[str, Any]], side: str) -> dict[str, float]:
    """Return dtype -> rows per second of a side, from rows of the report that have no error."""
    return {row["dtype"]: row["rows_per_second"] for row in rows if row["side"] == side}


def format_report(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    measured = [row for row in report["rows"] if "error" not in row]
    # The name of a column, the key of its value in a row, and the value's format.
    columns = [
        ("s/step, median", "median_seconds", ".4f"),
        ("min", "min_seconds", ".4f"),
        ("rows/s", "rows_per_second", ".2f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("model TFLOP/s", "model_tflops", ".3g"),
        ("of the peak", "mfu", ".1%"),
        ("GiB", "peak_gib", ".2f"),
    ]
    columns = [column for column in columns if any(row[column[1]] is not None for row in measured)]
    lines = [
        f"{report['machine']}; {', '.join(report['versions'])}",
        "",
        f"`{report['config']}`: {report['kind']}, batch {report['batch']}; parameters: "
        + ", ".join(f"{side} {count:,}" for side, count in report["parameters"].items()),
        "",
        "| " + " | ".join(["", "dtype", *(name for name, _, _ in columns)]) + " |",
        "| " + " | ".join(["---"] * (len(columns) + 2)) + " |",
    ]
    for row in report["rows"]:
        if "error" in row:
            cells = [f"failed: {row['error']}", *[""] * (len(columns) - 1)][: len(columns)]
        else:
            cells = ["" if row[key] is None else format(row[key], spec) for _, key, spec in columns]
        lines.append(f"| {row['side']} | {row['dtype']} | {' | '.join(cells)} |")
    if report["ratios"]:
        sides = format_ratios(*(rates_of(measured, side) for side in ("dalle_jax", "torch")))
        lines += ["", f"Rows per second of dalle_jax over torch: {sides}."]
    return "\n".join(lines)


def measure(words: list[str], dtypes: list[str], steps: int, trace: str | None, peer_python: str | None):
    """Measure both sides for each dtype and return the report.

    Raises:
      ValueError, OSError: The configuration is invalid, or the peer does not have its network.
    """
    configs = {
        dtype: parse_train_args([*words, "--model.dtype", dtype], "benchmarks.train").config
        for dtype in dtypes
    }
    peers = {dtype: peer_job(config, steps) for dtype, config in configs.items()} if peer_python else {}
    rows, batch = [], configs[dtypes[0]].data.batch_size

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        outcome = row.get("error") or f"{row['median_seconds']:.4f} s/step"
        print(f"{row['side']} {row['dtype']}: {outcome}", file=sys.stderr, flush=True)

    for dtype in dtypes:
        job = {
            "words": [*words, "--model.dtype", dtype],
            "steps": steps,
            "trace": str(Path(trace) / dtype) if trace else None,
        }
        ours = run_job(sys.executable, "benchmarks.train", job)
        add(report_row("dalle_jax", dtype, batch, ours, ours))
        if peer_python and not isinstance(ours, str):
            job = peers[dtype] | {"parameters": ours["parameters"]}
            result = run_job(peer_python, "benchmarks.train_peer", job)
            add(report_row("torch", dtype, batch, result, ours))
    measured = [row for row in rows if "error" not in row]
    return {
        "machine": describe_machine(*(measured[0][key] for key in ("device", "devices")) if measured else ()),
        "versions": list(dict.fromkeys(row["version"] for row in measured)),
        "config": " ".join(words),
        "kind": configs[dtypes[0]].model.kind,
        "batch": batch,
        "parameters": {row["side"]: row["parameters"] for row in measured},
        "rows": rows,
        "ratios": speed_ratios(*(rates_of(measured, side) for side in ("dalle_jax", "torch"))),
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that are not those of a configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trace")
    parser.add_argument("--peer-python")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.job:
        job = json.loads(args.job)
        with contextlib.redirect_stdout(sys.stderr):
            config = parse_train_args(job["words"], "benchmarks.train").config
            result = time_steps(config, job["steps"], job["trace"])
        print(json.dumps(result))
        return 0
    if not rest or rest[0].startswith("-"):
        parser.error("the first argument is a configuration: python -m benchmarks.train configs/X.py")
    try:
        report = measure(rest, args.dtypes, args.steps, args.trace, args.peer_python)
    except (ValueError, OSError) as error:
        print(f"benchmarks.train: error: {error}", file=sys.stderr)
        return 2
    print(format_report(report), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report))
    return 1 if any("error" in row for row in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
