"""`dalle-jax info`: what a model is and needs, from its configuration alone; nothing is allocated."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
from tyro.conf import Positional, arg

from dalle_jax.aot import sampler
from dalle_jax.aot.targets import Target, single_device_target
from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.cli.common_args import JsonFlag, resolve_config
from dalle_jax.config import (
    BartConfig,
    ClipConfig,
    DalleConfig,
    DiffusionConfig,
    DVAEConfig,
    MeshConfig,
    Quantization,
    TrainConfig,
    TransformerConfig,
    VQGANConfig,
)
from dalle_jax.models import autoregressive, clip, tokenizer
from dalle_jax.models.diffusion import unet
from dalle_jax.models.vqgan import adversarial
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import path_name
from dalle_jax.train.adversarial_optim import adversarial_optimizer, tokenizer_params
from dalle_jax.train.metrics import read_metrics
from dalle_jax.train.optim import make_optimizer


@dataclass(frozen=True, kw_only=True)
class InfoArgs:
    """Tells the size of a model, without allocating it: parameters in all and by part, their shapes, and the
    memory that training and drawing need for them."""

    target: Positional[Annotated[str, arg(metavar="RUN_OR_CONFIG")]]
    """run directory or configuration file"""
    shapes: bool = False
    """list the shape of every parameter (--json always does)"""
    batch_size: int | None = None
    """pictures drawn at once: adds what that takes, by the compiler, and the largest batch that fits the device"""
    use_cfg: bool = False
    """with --batch-size: drawn with classifier-free guidance"""
    quantization: Quantization | None = None
    """with --batch-size: drawn with the matrices in 8 bits"""
    device: str | None = None
    """with --batch-size: on a device that is not here, named as for train.py --compile-only: h200, v5e:1x1"""
    json: JsonFlag = False


def run(args: InfoArgs) -> dict[str, Any]:
    """Counts and prints."""
    for name, value in (("quantization", args.quantization), ("device", args.device)):
        if args.batch_size is None and value is not None:
            raise ValueError(f"--{name} is for what drawing takes; give --batch-size as well")
    # First of all: what makes an array has jax look for its devices, and leave compilers for others out.
    try:
        where = None if args.device is None else single_device_target(args.device, "--device")
    except ModuleNotFoundError as error:
        raise ValueError(error) from None
    config = resolve_config(args.target)
    result = describe_model(config)
    if args.batch_size is not None:
        if not isinstance(config.model, TransformerConfig):
            raise ValueError(
                f"--batch-size asks what drawing takes; {args.target} is of stage {config.model.kind}"
            )
        result["sampling"] = describe_sampling(
            config.model, args.batch_size, guided=args.use_cfg, weights=args.quantization, where=where
        )
    if Path(args.target).is_dir():
        result |= describe_run(Path(args.target))
    _print(result, args.shapes)
    return result


def describe_model(config: TrainConfig) -> dict[str, Any]:
    """`parameters` in all and by part, `shapes`, sizes of the stage, `memory` in bytes on one device.

    Memory of training has no activations: those depend on the batch, the compute type and remat.
    """
    model = config.model
    match model:
        case DVAEConfig() | VQGANConfig():
            shapes = jax.eval_shape(partial(tokenizer.init, model), jax.random.key(0))
            about = {
                "grid": model.grid,
                "num_codes": model.num_codes,
                "image_size": model.image_size,
                "vocab": model.vocab,
            }
        case DalleConfig() | BartConfig():
            shapes = jax.eval_shape(partial(autoregressive.init, model), jax.random.key(0))
            about = {
                "grid": model.grid,
                "num_codes": model.num_codes,
                "text_vocab": model.text_vocab,
                "text_len": model.text_len,
                "image_vocab": model.image_vocab,
                "length": model.seq_len,
                "layers": model.layers,
                "tokenizer": config.image_tokenizer,
            }
        case ClipConfig():
            shapes = jax.eval_shape(partial(clip.init, model), jax.random.key(0))
            about = {
                "image_size": model.image_size,
                "patch": model.patch_size,
                "text_vocab": model.text_vocab,
                "text_len": model.text_len,
                "embed_dim": model.embed_dim,
            }
        case DiffusionConfig():
            shapes = jax.eval_shape(partial(unet.init, model), jax.random.key(0))
            reads = {
                "captions": model.text,
                "labels": model.num_classes,
                "codes": model.codes,
                "low": model.low_res_size,
            }
            about = {
                "image_size": model.image_size,
                "sides": model.sizes,
                "prediction": model.prediction,
                "noise": model.noise.kind,
                "reads": ", ".join(name for name, value in reads.items() if value) or "nothing",
            }
    trained, tx = shapes, make_optimizer(config.optim, config.steps, shapes)
    if isinstance(model, VQGANConfig):  # trains with a discriminator beside it
        trained = jax.eval_shape(partial(adversarial.init, model), jax.random.key(0))
        own = make_optimizer(config.optim, config.steps, tokenizer_params(trained))
        tx = adversarial_optimizer(model, own)
        about["discriminator_parameters"] = _count(trained.get("discriminator", {}))
    size = _bytes(trained)
    memory = {
        "parameters": size,
        "gradients": size,
        "optimizer": _bytes(jax.eval_shape(tx.init, trained)),
        "ema": _bytes(shapes) if config.optim.ema_decay else 0,  # of the model, not of what trains beside it
    }
    memory["training_without_activations"] = sum(memory.values())
    if isinstance(model, TransformerConfig):
        memory["kv_cache_per_picture"] = _bytes(jax.eval_shape(partial(autoregressive.init_cache, model, 1)))
    return {
        "stage": model.kind,
        "parameters": _count(shapes),
        "parts": {name: _count(part) for name, part in shapes.items()},
        **about,
        "dtype": model.dtype,
        "batch": config.data.batch_size,
        "steps": config.steps,
        "memory": memory,
        "shapes": {
            path_name(path): list(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
        },
    }


def describe_sampling(
    cfg: TransformerConfig,
    batch: int,
    *,
    guided: bool = False,
    weights: Quantization | None = None,
    where: Target | None = None,
) -> dict[str, Any]:
    """What drawing `batch` pictures of as many captions takes, in bytes, as the compiler of the first device lays
    `generate` out; nothing is allocated.

    where: a device that is not here, in place of the first.
    Parts of `total`: `stored`, on a CPU the parameters of the run, `parameters`, their copy in the form that sampling
    wants, and `caches`. The image tokenizer is not counted. `device` is the memory that the device has,
    `largest_batch` the most pictures that fit there, from how `total` grows between one picture and `batch`.
    Raises ValueError for a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"--batch-size is {batch}; want at least 1 picture")
    where = single_device_target("local", "--device") if where is None else where
    mesh = make_mesh(MeshConfig(data=1), where.devices)

    def total(rows: int) -> tuple[sampler.LoweredSampler, int]:
        codes = sampler.lower_sampler(cfg, rows, mesh, quantization=weights, use_cfg=guided)
        with jax.set_mesh(mesh):
            size = codes.lower().compile().memory_analysis()
        taken = size.output_size_in_bytes + size.temp_size_in_bytes + size.generated_code_size_in_bytes
        return codes, codes.checkpoint_bytes + codes.params_bytes + codes.input_bytes + taken

    codes, whole = total(batch)
    memory = _device_memory() if where.hbm_gib is None else int(where.hbm_gib * 2**30)
    other = 1 if batch > 1 else 2
    per_picture = abs(whole - total(other)[1]) / abs(batch - other)
    return {
        "batch": batch,
        "guided": guided,
        "quantization": weights,
        "on": where.devices[0].device_kind,
        "stored": codes.checkpoint_bytes,
        "parameters": codes.params_bytes,
        "caches": _bytes(jax.eval_shape(partial(autoregressive.init_cache, cfg, batch, use_cfg=guided))),
        "total": whole,
        "device": memory,
        "fits": whole <= memory,
        "largest_batch": max(0, int(batch + (memory - whole) // per_picture)),
    }


def _device_memory() -> int:
    """Bytes of the machine, which are those of a CPU."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_run(path: Path) -> dict[str, Any]:
    """How far a run is: `step` (None without a checkpoint), `saved_steps`, `best_step` and its `measures`."""
    result: dict[str, Any] = {"run": str(path), "step": None, "saved_steps": [], "best_step": None}
    if (path / "checkpoints").is_dir():
        checkpoints = CheckpointManager(path / "checkpoints")
        try:
            result |= {
                "step": checkpoints.latest,
                "saved_steps": checkpoints.steps,
                "best_step": checkpoints.best,
            }
        finally:
            checkpoints.close()
    used = result["step"] if result["best_step"] is None else result["best_step"]
    rows = [row for row in read_metrics(path / "metrics.jsonl") if row["step"] == used]
    found = {k: v for row in rows for k, v in row.items() if k.startswith("eval_")}
    return result | {"measures": found}


def _count(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _print(result: dict[str, Any], shapes: bool) -> None:
    for name, value in result.items():
        if name == "shapes" and not shapes:
            continue
        if not isinstance(value, dict):
            print(f"{name:<14}{_number(value)}")
            continue
        print(name)
        width = max((len(k) for k in value), default=0)
        for k, v in value.items():
            print(f"  {k:<{width}}  {_size(v) if _in_bytes(name, k) else _number(v)}")


def _in_bytes(part: str, name: str) -> bool:
    return part == "memory" or (
        part == "sampling" and name in ("stored", "parameters", "caches", "total", "device")
    )


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    for unit, letter in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {letter}"
    return f"{count} B"
