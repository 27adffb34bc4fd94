"""Quantizers: vectors to codes of a finite set and back, with gradients that pass through.

Nearest code (van den Oord et al. 2017, 1711.00937; on the unit sphere: Yu et al. 2021, 2110.04627), Gumbel-softmax
(Jang et al. 2016, 1611.01144) and rounding without a codebook (FSQ, Mentzer et al. 2023, 2309.15505). Each has
`init`, `codes` (deterministic, for use), `lookup`, and `quantize` (for training).
B batch, h w code grid, C input channels, D width of a code, V codebook, P = B*h*w places.

A code that no vector is nearest to gets no gradient and stays where it is: `restart` puts it where one is missed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import FiniteScalarQuantizer, GumbelQuantizer, Quantizer, VectorQuantizer
from dalle_jax.models.tokenizer_losses import kl_to_uniform
from dalle_jax.typing import Params


class Quantized(NamedTuple):
    """z: float32 (B, h, w, D), the codes' vectors in the forward pass, with a gradient to the input. codes: int32
    (B, h, w). loss: float32 scalar that training adds."""

    z: jax.Array
    codes: jax.Array
    loss: jax.Array


def init(cfg: Quantizer, key: jax.Array) -> Params:
    """Fresh float32 parameters; {} for FSQ, which has none."""
    match cfg:
        case VectorQuantizer(normalize=True):
            table_VD = jax.random.normal(key, (cfg.vocab, cfg.dim))
            return {"embedding": _unit(table_VD)}
        case VectorQuantizer():
            return {
                "embedding": jax.random.uniform(key, (cfg.vocab, cfg.dim), minval=-1, maxval=1) / cfg.vocab
            }
        case GumbelQuantizer():
            k_proj, k_embed = jax.random.split(key)
            kernel = jax.random.normal(k_proj, (cfg.dim, cfg.vocab)) / np.sqrt(cfg.dim)
            return {
                "proj": {"kernel": kernel, "bias": jnp.zeros(cfg.vocab)},
                "embedding": jax.random.normal(k_embed, (cfg.vocab, cfg.dim)),
            }
        case FiniteScalarQuantizer():
            return {}
    raise ValueError(f"no quantizer {type(cfg).__name__}")


def nearest_codes(cfg: Quantizer, params: Params, z_BhwC: jax.Array) -> jax.Array:
    """The code of every vector, int32 (B, h, w), without noise; the first one where several are as near."""
    z = z_BhwC.astype(jnp.float32)
    match cfg:
        case VectorQuantizer():
            table_VD = _table(cfg, params)
            z = _unit(z) if cfg.normalize else z
            # |z - e|^2 without |z|^2, which no code changes
            far = jnp.sum(jnp.square(table_VD), axis=1)[None, None, None] - 2 * _dot(z, table_VD.T)
            return jnp.argmin(far, axis=-1).astype(jnp.int32)
        case GumbelQuantizer():
            return jnp.argmax(_logits(params, z), axis=-1).astype(jnp.int32)
        case FiniteScalarQuantizer():
            levels = jnp.round(_bound(cfg, z)) + _half(cfg)
            return jnp.sum(levels * _basis(cfg), axis=-1).astype(jnp.int32)
    raise ValueError(f"no quantizer {type(cfg).__name__}")


def embed_codebook(cfg: Quantizer, params: Params, codes_Bhw: jax.Array) -> jax.Array:
    """The vectors of codes, float32 (B, h, w, D)."""
    match cfg:
        case VectorQuantizer():
            return _table(cfg, params)[codes_Bhw]
        case GumbelQuantizer():
            return params["embedding"][codes_Bhw]
        case FiniteScalarQuantizer():
            shape = (1,) * codes_Bhw.ndim + (-1,)
            levels = jnp.asarray(cfg.levels).reshape(shape)
            basis = _basis(cfg).astype(jnp.int32).reshape(shape)
            return (codes_Bhw[..., None] // basis % levels - _half(cfg)) / _half(cfg)
    raise ValueError(f"no quantizer {type(cfg).__name__}")


def quantize(
    cfg: Quantizer, params: Params, z_BhwC: jax.Array, key: jax.Array, tau: jax.Array | float = 1.0
) -> Quantized:
    """Codes with gradients: straight through to the input, and the loss that trains codebook and encoder.

    tau: temperature of the Gumbel-softmax, above 0; others ignore it. The Gumbel codes are drawn, not the most
    probable ones.
    """
    z = z_BhwC.astype(jnp.float32)
    match cfg:
        case VectorQuantizer():
            found = nearest_codes(cfg, params, z)
            z = _unit(z) if cfg.normalize else z
            e = embed_codebook(cfg, params, found)
            hold = jax.lax.stop_gradient
            # 1711.00937, eq. 3: beta is on the term that moves the encoder
            loss = cfg.codebook_weight * jnp.mean(jnp.square(hold(z) - e))
            loss += cfg.commitment_weight * jnp.mean(jnp.square(z - hold(e)))
            return Quantized(z + hold(e - z), found, loss)
        case GumbelQuantizer():
            logits = _logits(params, z)
            soft_BhwV = jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / tau)
            found = jnp.argmax(soft_BhwV, axis=-1).astype(jnp.int32)
            hard_BhwV = jax.nn.one_hot(found, cfg.vocab)
            weights = soft_BhwV + jax.lax.stop_gradient(hard_BhwV - soft_BhwV)
            loss = cfg.kl_weight * jnp.mean(kl_to_uniform(logits))
            return Quantized(_dot(weights, params["embedding"]), found, loss)
        case FiniteScalarQuantizer():
            bounded = _bound(cfg, z)
            rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
            return Quantized(rounded / _half(cfg), nearest_codes(cfg, params, z), jnp.float32(0.0))
    raise ValueError(f"no quantizer {type(cfg).__name__}")


class CodeRestart(NamedTuple):
    """idle: int32 (V,), updates since a code was used. due: bool (V,), the codes that begin anew. vectors: float32
    (V, D), where those do; the other rows mean nothing."""

    idle: jax.Array
    due: jax.Array
    vectors: jax.Array


def restart_dead_codes(
    cfg: VectorQuantizer,
    params: Params,
    idle_V: jax.Array,
    z_BhwD: jax.Array,
    codes_Bhw: jax.Array,
    key: jax.Array,
) -> CodeRestart:
    """Which codes were not used for `cfg.dead_code_restart_steps` updates, this one counted, and vectors in their place.

    Random restarts (Lancucki et al. 2020, 2005.08520; Dhariwal et al. 2020, 2005.00341) take vectors of the batch.
    Here they are drawn without replacement, each in proportion to its squared distance from its code, as k-means++
    draws its centres (Arthur and Vassilvitskii 2007): uniform draws would mostly be of what is frequent and has codes
    already. Where more codes are due than there are vectors, the last ones wait.
    """
    z_PD, codes_P = z_BhwD.astype(jnp.float32).reshape(-1, cfg.dim), codes_Bhw.reshape(-1)
    z_PD = _unit(z_PD) if cfg.normalize else z_PD
    uses_V = jnp.zeros(cfg.vocab, jnp.int32).at[codes_P].add(1)
    idle_V = jnp.where(uses_V > 0, 0, idle_V + 1)
    due_V = idle_V >= cfg.dead_code_restart_steps
    far_P = jnp.sum(jnp.square(z_PD - embed_codebook(cfg, params, codes_P)), axis=1)
    # The places of the largest log-weights with Gumbel noise are such a draw (Kool et al. 2019, 1903.06059).
    count = min(cfg.vocab, len(z_PD))
    _, places = jax.lax.top_k(jnp.log(far_P) + jax.random.gumbel(key, far_P.shape), count)
    turn_V = jnp.cumsum(due_V) - 1
    due_V &= turn_V < count
    vectors_VD = z_PD[places[jnp.clip(turn_V, 0, count - 1)]]
    return CodeRestart(jnp.where(due_V, 0, idle_V), due_V, vectors_VD)


def _dot(x, y):
    # Full precision also where the backend multiplies float32 coarsely: a near tie decides a code.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def _table(cfg: VectorQuantizer, params: Params) -> jax.Array:
    return _unit(params["embedding"]) if cfg.normalize else params["embedding"]


def _logits(params: Params, z_BhwC: jax.Array) -> jax.Array:
    return _dot(z_BhwC, params["proj"]["kernel"]) + params["proj"]["bias"][None, None, None]


def _half(cfg: FiniteScalarQuantizer) -> jax.Array:
    """Half the levels, rounded down, (1, 1, 1, D): what rounded values are divided by."""
    return jnp.asarray([level // 2 for level in cfg.levels], jnp.float32)[None, None, None]


def _basis(cfg: FiniteScalarQuantizer) -> jax.Array:
    """What a level of each channel counts in a code, (1, 1, 1, D); the first channel counts 1."""
    return jnp.asarray(np.cumprod([1, *cfg.levels[:-1]]), jnp.float32)[None, None, None]


def _bound(cfg: FiniteScalarQuantizer, z: jax.Array) -> jax.Array:
    """`z` squeezed so that rounding gives `level` values per channel; 2309.15505, fig. 7 (eps 1e-3)."""
    levels = jnp.asarray(cfg.levels, jnp.float32)[None, None, None]
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = jnp.where(levels % 2 == 0, 0.5, 0.0)
    return jnp.tanh(z + jnp.arctanh(offset / half)) * half - offset
