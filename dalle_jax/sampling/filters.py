"""From logits to one token per row: guidance, temperature, top-k, top-p. B batch, V vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def guide(cond_BV: jax.Array, null_BV: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance: null + scale * (cond - null); 1 is the conditional model, 0 ignores the caption."""
    return null_BV + scale * (cond_BV - null_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Minus infinity for all but the k highest of each row; ties with the k-th stay. k is static."""
    if k < 1:
        raise ValueError(f"top_k is {k}; want at least 1, or None to keep every token")
    kth_B = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1]
    return jnp.where(logits_BV >= kth_B[:, None], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """Minus infinity outside the smallest set of most probable tokens whose share reaches p in (0, 1].

    The most probable token always stays; tokens as probable as the last one kept stay (Holtzman et al. 2019).
    """
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    ordered_BV = -jnp.sort(-probs_BV, axis=-1)
    before_BV = jnp.cumsum(ordered_BV, axis=-1) - ordered_BV
    within_BV = (before_BV < p) | (jnp.asarray(p) >= 1)  # a float32 sum reaches 1 before its improbable tail
    last_B = jnp.min(jnp.where(within_BV, ordered_BV, jnp.inf), axis=-1)
    last_B = jnp.minimum(last_B, ordered_BV[:, 0])
    return jnp.where(probs_BV >= last_B[:, None], logits_BV, -jnp.inf)


def draw(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: jax.Array | float | None = None,
) -> jax.Array:
    """One token per row, each by its own key; temperature 0 takes the most probable one.

    Top-k applies first, then the temperature, then top-p. Returns int32 (B,).
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if top_k is not None:
        logits_BV = keep_top_k(logits_BV, top_k)
    best_B = jnp.argmax(logits_BV, axis=-1)
    warm_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if top_p is not None:
        warm_BV = keep_top_p(warm_BV, top_p)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, warm_BV)
    return jnp.where(jnp.asarray(temperature) > 0, drawn_B, best_B).astype(jnp.int32)
