"""`dalle-jax info`: size and memory of a model, computed from its configuration without allocating it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
from tyro.conf import Positional, arg

from dalle_jax.aot.sampler import LoweredSampler, lower_sampler
from dalle_jax.aot.targets import Target, single_device_target
from dalle_jax.checkpoint.layout import METRICS_FILE, PARAMS_FILE
from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.checkpoint.params_file import read_params_step
from dalle_jax.checkpoint.remote_dir import checkpoints_of, is_url, local_dir
from dalle_jax.cli.common_args import JsonFlag, resolve_config
from dalle_jax.config import MeshConfig, Quantization, TrainConfig, TransformerConfig
from dalle_jax.models import autoregressive
from dalle_jax.models.registry import model_shapes, model_spec
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import path_name
from dalle_jax.train.metrics import read_metrics
from dalle_jax.train.state import ema_params, param_shapes, task_optimizer
from dalle_jax.train.tasks import make_task

_SAMPLING_BYTES = ("checkpoint_parameters", "parameters", "caches", "total", "device_memory")


@dataclass(frozen=True, kw_only=True)
class InfoArgs:
    """Print the size of a model without allocating it: the number of parameters, in total and by part, their shapes,
    and the memory for training and sampling."""

    target: Positional[Annotated[str, arg(metavar="RUN_OR_CONFIG")]]
    """run directory or its URL, configuration file or name of a shipped configuration"""
    shapes: bool = False
    """list the shape of every parameter (--json always does)"""
    batch_size: int | None = None
    """also print the memory for sampling this many images at once, by the compiler, and the largest batch that fits"""
    use_cfg: bool = False
    """with --batch-size: sample with classifier-free guidance"""
    quantization: Quantization | None = None
    """with --batch-size: sample with 8-bit weights"""
    device: Annotated[str | None, arg(metavar="TARGET")] = None
    """with --batch-size: for a device that is not attached, named as for `train --compile-only`: h200, v5e:1x1"""
    json: JsonFlag = False


def run(args: InfoArgs) -> dict[str, Any]:
    """Compute and print the sizes."""
    for name in ("use_cfg", "quantization", "device"):
        if args.batch_size is None and getattr(args, name) != getattr(InfoArgs, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"Expected --batch-size with {flag}, got none. Set --batch-size or remove {flag}."
            )
    # Before any array exists: the first array makes jax initialize its devices, and then it cannot add compilers.
    try:
        target = None if args.device is None else single_device_target(args.device, "--device")
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from None
    config = resolve_config(args.target)
    result = _describe_model(config)
    if args.batch_size is not None:
        if not isinstance(config.model, TransformerConfig):
            raise ValueError(
                f"Expected a Transformer with --batch-size, got {args.target} of stage {config.model.kind}. Remove "
                "--batch-size."
            )
        result["sampling"] = _describe_sampling(
            config.model, args.batch_size, use_cfg=args.use_cfg, quantization=args.quantization, target=target
        )
    if is_url(args.target) or Path(args.target).is_dir():
        result |= _describe_run(args.target)
    _print(result, args.shapes)
    return result


def _describe_model(config: TrainConfig) -> dict[str, Any]:
    """Parameters, sizes and training memory in bytes on one device, without activations.

    Activations depend on the batch, the compute dtype and rematerialization.
    """
    model, task = config.model, make_task(config)
    spec, shapes, trained = model_spec(model), model_shapes(model), param_shapes(task)
    optimizer = jax.eval_shape(task_optimizer(task).init, trained)
    memory = {
        "parameters": _num_bytes(trained),
        "gradients": _num_bytes(trained),
        "optimizer": _num_bytes(optimizer),
        "ema": _num_bytes(ema_params(task, trained)),
    }
    memory["training_without_activations"] = sum(memory.values())
    if spec.transformer is not None:
        cache = jax.eval_shape(partial(spec.transformer.init_cache, model, 1))
        memory["kv_cache_per_image"] = _num_bytes(cache)
    result = {
        "stage": model.kind,
        "parameters": _num_elements(shapes),
        "parts": {name: _num_elements(part) for name, part in shapes.items()},
        **spec.describe(model),
        "dtype": model.dtype,
        "batch": config.data.batch_size,
        "steps": config.steps,
        "memory": memory,
        "shapes": {
            path_name(path): list(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
        },
    }
    if spec.init_training is not None:  # a discriminator
        result["parameters_in_training"] = _num_elements(trained)
    if config.image_tokenizer is not None:
        result["image_tokenizer"] = config.image_tokenizer
    return result


def _describe_sampling(
    cfg: TransformerConfig,
    batch_size: int,
    *,
    use_cfg: bool = False,
    quantization: Quantization | None = None,
    target: Target | None = None,
) -> dict[str, Any]:
    """Memory in bytes for sampling `batch_size` images of as many captions, by the compiler of the device.

    `total` contains `checkpoint_parameters` (on a CPU, the parameters of the run), `parameters` (their copy prepared
    for decoding) and `caches`, but not the image tokenizer. `largest_batch` follows from how `total` grows with the
    batch. target: None is the first device of this machine.
    """
    if batch_size < 1:
        raise ValueError(f"Expected --batch-size of at least 1, got {batch_size}.")
    target = single_device_target("local", "--device") if target is None else target
    mesh = make_mesh(MeshConfig(data=1), target.devices)

    def compiled(rows: int) -> tuple[LoweredSampler, int]:
        lowered = lower_sampler(cfg, rows, mesh, quantization=quantization, use_cfg=use_cfg)
        with jax.set_mesh(mesh):
            stats = lowered.lower().compile().memory_analysis()
        program = stats.output_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
        return lowered, lowered.checkpoint_bytes + lowered.params_bytes + lowered.input_bytes + program

    lowered, total = compiled(batch_size)
    device_memory = _machine_memory() if target.hbm_gib is None else int(target.hbm_gib * 2**30)
    other = 1 if batch_size > 1 else 2
    bytes_per_image = abs(total - compiled(other)[1]) / abs(batch_size - other)
    init_cache = partial(autoregressive.init_cache, cfg, batch_size, use_cfg=use_cfg)
    return {
        "batch": batch_size,
        "use_cfg": use_cfg,
        "quantization": quantization,
        "device_kind": target.devices[0].device_kind,
        "checkpoint_parameters": lowered.checkpoint_bytes,
        "parameters": lowered.params_bytes,
        "caches": _num_bytes(jax.eval_shape(init_cache)),
        "total": total,
        "device_memory": device_memory,
        "fits": total <= device_memory,
        "largest_batch": max(0, int(batch_size + (device_memory - total) // bytes_per_image)),
    }


def _describe_run(run: str) -> dict[str, Any]:
    """Progress of a run: `step` (None without a checkpoint), `saved_steps`, `best_step` and its `metrics`.

    An exported run has the step of its parameters and no `saved_steps`.
    """
    result: dict[str, Any] = {"run": run, "step": None, "saved_steps": [], "best_step": None}
    path = local_dir(run)
    directory = checkpoints_of(path)
    if directory.is_dir():
        checkpoints = CheckpointManager(directory)
        try:
            result["step"], result["best_step"] = checkpoints.latest, checkpoints.best
            result["saved_steps"] = checkpoints.steps
        finally:
            checkpoints.close()
    elif (path / PARAMS_FILE).is_file():
        result["step"] = read_params_step(path / PARAMS_FILE)
    step = result["step"] if result["best_step"] is None else result["best_step"]
    rows = [row for row in read_metrics(path / METRICS_FILE) if row["step"] == step]
    return result | {"metrics": {k: v for row in rows for k, v in row.items() if k.startswith("eval_")}}


def _machine_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _num_elements(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _num_bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _print(result: dict[str, Any], shapes: bool) -> None:
    column = max((len(name) for name, value in result.items() if not isinstance(value, dict)), default=0)
    for name, value in result.items():
        if name == "shapes" and not shapes:
            continue
        if not isinstance(value, dict):
            print(f"{name:<{column}}  {_format_number(value)}")
            continue
        print(name)
        width = max((len(key) for key in value), default=0)
        for key, entry in value.items():
            in_bytes = name == "memory" or (name == "sampling" and key in _SAMPLING_BYTES)
            print(f"  {key:<{width}}  {_format_bytes(entry) if in_bytes else _format_number(entry)}")


def _format_number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_bytes(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"
