"""AdamW as DALL-E used it (Ramesh et al. 2021, 2102.12092, B.2): decay on matrices only, clipping of the
global gradient norm, linear warm-up, then cosine or constant; two optimizers with less state in its place; and
the averaged parameters that sampling uses.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.config import OptimConfig
from dalle_jax.typing import Params

FROZEN = ("t5",)  # parts of a model that are trained elsewhere: the encoder of captions (nn/t5.py)


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of the update that follows `count` updates.

    It rises in a line from 0 to `cfg.learning_rate` over `warmup_steps` updates; then it stays (`constant`)
    or follows half a cosine down to `final_lr_ratio` times that, reached after `decay_steps` updates counted
    from the start (`steps` where it is None), and stays there. The half-cosine has no length when the
    warm-up is longer than that; then the rate drops to its end.

    Returns a function of an int count (traced or not) giving a float32 scalar.
    """
    peak, end = cfg.learning_rate, cfg.learning_rate * cfg.final_lr_ratio
    length = max(steps if cfg.decay_steps is None else cfg.decay_steps, cfg.warmup_steps) - cfg.warmup_steps

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        warm = peak * count / max(cfg.warmup_steps, 1)
        if cfg.schedule == "constant":
            after = jnp.float32(peak)
        else:
            share = jnp.clip((count - cfg.warmup_steps) / length, 0.0, 1.0) if length else jnp.float32(1.0)
            after = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        return jnp.where(count < cfg.warmup_steps, warm, after)

    return rate


def decay_mask(params: Params) -> Params:
    """True for each parameter that weight decay pulls to zero: those named `kernel`.

    By name and not by rank, because blocks are stacked over layers: there a bias has two axes. Biases, norm
    scales, gains and embeddings have other names and are left alone.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


def make_optimizer(cfg: OptimConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """The optimizer of `cfg` with clipping, decay mask and schedule.

    steps: updates of the whole run, the length of the schedule where `cfg.decay_steps` is None. params:
    arrays or ShapeDtypeStructs; only their names are used. A `clip_norm` of 0 leaves clipping out. Adafactor
    (Shazeer and Stern 2018, 1804.04235) keeps sums over rows and columns of the squared gradient, no first
    moment, and takes the same learning rate as the others: updates have the size of one per entry in all three.
    Parts in FROZEN keep their values, and take no state.
    """
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    match cfg.optimizer:
        case "adamw":
            direction = [optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)]
        case "adamw_bf16":
            direction = [_kept_in_bfloat16(optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps))]
        case "adafactor":
            direction = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    decay = optax.add_decayed_weights(cfg.weight_decay, decay_mask)
    rate = optax.scale_by_learning_rate(learning_rate(cfg, steps))
    tx = optax.chain(*clip, optax.chain(*direction, decay, rate))
    if not any(name in params for name in FROZEN):
        return tx
    labels = {name: jax.tree.map(lambda _, n=name: n in FROZEN, part) for name, part in params.items()}
    return optax.transforms.partition({False: tx, True: optax.set_to_zero()}, labels)


def _kept_in_bfloat16(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with its float32 state kept in bfloat16 between updates; what an update computes stays float32.

    Rounding keeps the second moment within 1 / (256 (1 - b2)) of itself: 10% at the paper's b2 of 0.96. The
    paper, too, kept its moments in 16 bits (2102.12092, 2.4).
    """

    def cast(state: Any, source: Any, target: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(target) if x.dtype == source else x, state)

    def init(params):
        return cast(tx.init(params), jnp.float32, jnp.bfloat16)

    def update(grads, state, params=None):
        updates, state = tx.update(grads, cast(state, jnp.bfloat16, jnp.float32), params)
        return updates, cast(state, jnp.float32, jnp.bfloat16)

    return optax.GradientTransformation(init, update)


def update_ema(ema: Params, params: Params, cfg: OptimConfig, step: jax.Array) -> Params:
    """The averaged parameters after `step` updates (int32 scalar, 1 after the first update).

    Every `ema_every` updates the average moves to the parameters: `ema = d ema + (1 - d) params`. The n-th
    time (n = 0, 1, ...) d is `min(ema_decay, (1 + n) / (10 + n))`, so that the random initial values, where
    the average starts, are forgotten early on (0.1 of them is left after the first time) and the average is
    of use in short runs too. In between the average stays as it is, to the last bit.
    """
    step = jnp.asarray(step, jnp.int32)
    n = (step // cfg.ema_every - 1).astype(jnp.float32)
    now = (step % cfg.ema_every == 0) & (step > 0)
    decay = jnp.where(now, jnp.minimum(cfg.ema_decay, (1 + n) / (10 + n)), 1.0)
    return jax.tree.map(lambda e, p: jnp.where(now, decay * e + (1 - decay) * p, e), ema, params)
