"""Optimizers, learning rate schedule and exponential moving average (EMA) of the parameters.

AdamW follows DALL-E (Ramesh et al. 2021, 2102.12092, B.2): weight decay on matrices only, clipping of the global
gradient norm, linear warmup. AdamW with bfloat16 moments and Adafactor need less memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.config import OptimConfig
from dalle_jax.typing import Params

FROZEN = ("t5",)  # top-level parameters that are not trained: the T5 caption encoder (nn/t5.py)


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Return the learning rate schedule.

    The rate rises linearly from 0 to `cfg.learning_rate` over `warmup_steps` updates. Then it is constant, or follows
    half a cosine down to `final_lr_ratio` times the peak, reached after `decay_steps` updates from the start, and stays
    there. If the warmup is longer than `decay_steps`, the rate drops to its final value after the warmup.

    Args:
      cfg: Peak, warmup, schedule and end.
      steps: Updates of the whole run, used if `cfg.decay_steps` is None.

    Returns:
      A function from the number of completed updates (an int, traced or not) to the float32 rate of the next update.
    """
    peak, end = cfg.learning_rate, cfg.learning_rate * cfg.final_lr_ratio
    length = max(steps if cfg.decay_steps is None else cfg.decay_steps, cfg.warmup_steps) - cfg.warmup_steps

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warmup = peak * count / max(cfg.warmup_steps, 1)
        if cfg.schedule == "constant":
            decayed = jnp.float32(peak)
        else:
            fraction = jnp.clip((count - cfg.warmup_steps) / length, 0.0, 1.0) if length else jnp.float32(1.0)
            decayed = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))
        return jnp.where(count < cfg.warmup_steps, warmup, decayed)

    return schedule


def decay_mask(params: Params) -> Params:
    """Return True for each parameter with weight decay: those named `kernel`.

    The name decides and not the rank, because blocks are stacked over layers, where a bias has two axes. Biases, norm
    scales, gains and embeddings have other names.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


def make_optimizer(cfg: OptimConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """Return the optimizer with clipping, weight decay mask and schedule.

    Adafactor (Shazeer and Stern 2018, 1804.04235) keeps row and column sums of the squared gradient and no first
    moment. It uses the same learning rate as AdamW: in both, an update has a size of about one per entry before
    scaling.

    Args:
      cfg: Optimizer and its hyperparameters. A `clip_norm` of 0 turns clipping off.
      steps: Updates of the whole run, the length of the schedule if `cfg.decay_steps` is None.
      params: Arrays or ShapeDtypeStructs; only their names are used. Entries in FROZEN keep their values and have no
        optimizer state.
    """
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    match cfg.optimizer:
        case "adamw":
            scaling = [optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)]
        case "adamw_bf16":
            scaling = [_with_bfloat16_state(optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps))]
        case "adafactor":
            scaling = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    decay = optax.add_decayed_weights(cfg.weight_decay, decay_mask)
    rate = optax.scale_by_learning_rate(learning_rate(cfg, steps))
    tx = optax.chain(*clip, optax.chain(*scaling, decay, rate))
    if not any(name in params for name in FROZEN):
        return tx
    labels = {name: jax.tree.map(lambda _, n=name: n in FROZEN, part) for name, part in params.items()}
    return optax.transforms.partition({False: tx, True: optax.set_to_zero()}, labels)


def _with_bfloat16_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Store the float32 state of `tx` in bfloat16 between updates; updates are computed in float32.

    The relative rounding error of the second moment is at most 1 / (256 (1 - b2)): 10% at the paper's b2 of 0.96. The
    paper stores its moments in 16 bits, too (2102.12092, sec. 2.4).
    """

    def cast(state: Any, source: Any, target: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(target) if x.dtype == source else x, state)

    def init(params):
        return cast(tx.init(params), jnp.float32, jnp.bfloat16)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, cast(state, jnp.bfloat16, jnp.float32), params)
        return updates, cast(state, jnp.float32, jnp.bfloat16)

    return optax.GradientTransformation(init, update)


def update_ema(ema: Params, params: Params, cfg: OptimConfig, step: jax.typing.ArrayLike) -> Params:
    """Return the averaged parameters after an update.

    Every `ema_every` updates `ema = d ema + (1 - d) params`, with `d = min(ema_decay, (1 + n) / (10 + n))` for the n-th
    average (n = 0, 1, ...). The small early d removes the random initial values (0.1 of them is left after the first
    average), so that averages are useful in short runs, too. Between averages the result equals `ema` bit for bit.

    Args:
      ema: Averages before the update.
      params: Parameters after the update, a tree like `ema`.
      cfg: `ema_decay` and `ema_every`.
      step: int32 scalar, number of completed updates, 1 after the first.
    """
    step = jnp.asarray(step, jnp.int32)
    n = (step // cfg.ema_every - 1).astype(jnp.float32)
    due = (step % cfg.ema_every == 0) & (step > 0)
    decay = jnp.where(due, jnp.minimum(cfg.ema_decay, (1 + n) / (10 + n)), 1.0)
    return jax.tree.map(lambda e, p: jnp.where(due, decay * e + (1 - decay) * p, e), ema, params)
