"""`dalle-jax info`: what a model is and needs, from its configuration alone; nothing is allocated."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dalle_jax import autoregressive, clip, tokenizer
from dalle_jax.cli.codes import config_of
from dalle_jax.cli.verbs import Info
from dalle_jax.config import (
    BartConfig,
    ClipConfig,
    DalleConfig,
    DVAEConfig,
    TrainConfig,
    TransformerConfig,
    VQGANConfig,
)
from dalle_jax.nn.sharding import path_name
from dalle_jax.tokenizer import adversarial
from dalle_jax.train.checkpoint import Checkpoints
from dalle_jax.train.metrics import read_metrics
from dalle_jax.train.optim import make_optimizer


def info(args: Info) -> dict[str, Any]:
    """Counts and prints."""
    config = config_of(args.target)
    result = describe_model(config)
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
                "length": model.length,
                "layers": model.layers,
                "tokenizer": config.tokenizer,
            }
        case ClipConfig():
            shapes = jax.eval_shape(partial(clip.init, model), jax.random.key(0))
            about = {
                "image_size": model.image_size,
                "patch": model.patch,
                "text_vocab": model.text_vocab,
                "text_len": model.text_len,
                "embed_dim": model.embed_dim,
            }
    trained, tx = shapes, make_optimizer(config.optim, config.steps, shapes)
    if isinstance(model, VQGANConfig):  # trains with a discriminator beside it
        trained = jax.eval_shape(partial(adversarial.init, model), jax.random.key(0))
        own = make_optimizer(config.optim, config.steps, adversarial.tokenizer_part(trained))
        tx = adversarial.optimizer(model, own)
        about["discriminator_parameters"] = _count(trained.get("discriminator", {}))
    size = _bytes(trained)
    averaged = config.optim.ema_decay > 0
    memory = {
        "parameters": size,
        "gradients": size,
        "optimizer": _bytes(jax.eval_shape(tx.init, trained)),
        "ema": size if averaged else 0,
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
        "batch": config.data.batch,
        "steps": config.steps,
        "memory": memory,
        "shapes": {
            path_name(path): list(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
        },
    }


def describe_run(path: Path) -> dict[str, Any]:
    """How far a run is: `step` (None without a checkpoint), `saved_steps`, `best_step` and its `measures`."""
    result: dict[str, Any] = {"run": str(path), "step": None, "saved_steps": [], "best_step": None}
    if (path / "checkpoints").is_dir():
        checkpoints = Checkpoints(path / "checkpoints")
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
            print(f"  {k:<{width}}  {_size(v) if name == 'memory' else _number(v)}")


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    for unit, letter in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {letter}"
    return f"{count} B"
