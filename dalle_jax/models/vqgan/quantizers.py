"""Quantizers: vectors to codes of a finite set and back, with straight-through gradients.

Nearest code (van den Oord et al. 2017, 1711.00937; on the unit sphere: Yu et al. 2021, 2110.04627), Gumbel-softmax
(Jang et al. 2016, 1611.01144) and rounding without a codebook (FSQ, Mentzer et al. 2023, 2309.15505). Each has
`init`, `nearest_codes` (deterministic, for encoding), `embed_codebook`, and `quantize` (for training). A code that is
nearest to no vector gets no gradient; `restart_dead_codes` moves it to a vector without a near code.
B batch, h w code grid, C input channels, D width of a code, V codebook, P = B*h*w positions.
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
    """The result of `quantize`.

    Attributes:
      z: float32 (B, h, w, D), the vectors of the codes, with a gradient to the input.
      codes: int32 (B, h, w).
      loss: float32 scalar, to add to the training loss.
    """

    z: jax.Array
    codes: jax.Array
    loss: jax.Array


def init(cfg: Quantizer, key: jax.Array) -> Params:
    """Initialize the parameters, float32; {} for FSQ, which has none."""
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
    raise ValueError(f"Expected the configuration of a quantizer, got {type(cfg).__name__}.")


def nearest_codes(cfg: Quantizer, params: Params, z_BhwC: jax.Array) -> jax.Array:
    """Return the nearest code of every vector, int32 (B, h, w), without noise; the first one of equally near codes."""
    z = z_BhwC.astype(jnp.float32)
    match cfg:
        case VectorQuantizer():
            table_VD = _table(cfg, params)
            z = _unit(z) if cfg.normalize else z
            # |z - e|^2 without |z|^2, which is equal for all codes
            distance = jnp.sum(jnp.square(table_VD), axis=1)[None, None, None] - 2 * _dot(z, table_VD.T)
            return jnp.argmin(distance, axis=-1).astype(jnp.int32)
        case GumbelQuantizer():
            return jnp.argmax(_logits(params, z), axis=-1).astype(jnp.int32)
        case FiniteScalarQuantizer():
            levels = jnp.round(_bound(cfg, z)) + _half(cfg)
            return jnp.sum(levels * _basis(cfg), axis=-1).astype(jnp.int32)
    raise ValueError(f"Expected the configuration of a quantizer, got {type(cfg).__name__}.")


def embed_codebook(cfg: Quantizer, params: Params, codes_Bhw: jax.Array) -> jax.Array:
    """Look up the vectors of codes, float32 (B, h, w, D)."""
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
    raise ValueError(f"Expected the configuration of a quantizer, got {type(cfg).__name__}.")


def quantize(
    cfg: Quantizer, params: Params, z_BhwC: jax.Array, key: jax.Array, tau: jax.Array | float = 1.0
) -> Quantized:
    """Quantize vectors for training, with straight-through gradients to the input and the loss of codebook and encoder.

    Args:
      z_BhwC: float, the encoder's output.
      key: of the Gumbel noise, with which Gumbel-softmax samples its codes; unused by the others.
      tau: temperature of the Gumbel-softmax, > 0; unused by the others.
    """
    z = z_BhwC.astype(jnp.float32)
    match cfg:
        case VectorQuantizer():
            codes = nearest_codes(cfg, params, z)
            z = _unit(z) if cfg.normalize else z
            e = embed_codebook(cfg, params, codes)
            stop = jax.lax.stop_gradient
            # 1711.00937, eq. 3: beta weights the term that trains the encoder
            loss = cfg.codebook_weight * jnp.mean(jnp.square(stop(z) - e))
            loss += cfg.commitment_weight * jnp.mean(jnp.square(z - stop(e)))
            return Quantized(z + stop(e - z), codes, loss)
        case GumbelQuantizer():
            logits = _logits(params, z)
            soft_BhwV = jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / tau)
            codes = jnp.argmax(soft_BhwV, axis=-1).astype(jnp.int32)
            hard_BhwV = jax.nn.one_hot(codes, cfg.vocab)
            weights = soft_BhwV + jax.lax.stop_gradient(hard_BhwV - soft_BhwV)
            loss = cfg.kl_weight * jnp.mean(kl_to_uniform(logits))
            return Quantized(_dot(weights, params["embedding"]), codes, loss)
        case FiniteScalarQuantizer():
            bounded = _bound(cfg, z)
            rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
            return Quantized(rounded / _half(cfg), nearest_codes(cfg, params, z), jnp.float32(0.0))
    raise ValueError(f"Expected the configuration of a quantizer, got {type(cfg).__name__}.")


class CodeRestart(NamedTuple):
    """The result of `restart_dead_codes`.

    Attributes:
      idle: int32 (V,), training steps since each code was used; 0 where it restarts.
      restart: bool (V,), the codes to restart.
      vectors: float32 (V, D), their new vectors; undefined in other rows.
    """

    idle: jax.Array
    restart: jax.Array
    vectors: jax.Array


def restart_dead_codes(
    cfg: VectorQuantizer,
    params: Params,
    idle_V: jax.Array,
    z_BhwD: jax.Array,
    codes_Bhw: jax.Array,
    key: jax.Array,
) -> CodeRestart:
    """Select codes that were unused for `cfg.dead_code_restart_steps` training steps, this one included, and new
    vectors.

    Random restarts (Lancucki et al. 2020, 2005.08520; Dhariwal et al. 2020, 2005.00341) take vectors of the batch. Here
    they are sampled without replacement, in proportion to the squared distance of each from its code, as k-means++
    samples its centers (Arthur and Vassilvitskii 2007): uniform samples would mostly be frequent vectors, which have
    near codes already. Where more codes are unused than there are vectors, the last ones restart in a later step.

    Args:
      idle_V: int32, steps since each code was used, before this one.
      z_BhwD: float, the encoder's output.
      codes_Bhw: int32, its codes.
      key: of the samples.
    """
    z_PD, codes_P = z_BhwD.astype(jnp.float32).reshape(-1, cfg.dim), codes_Bhw.reshape(-1)
    z_PD = _unit(z_PD) if cfg.normalize else z_PD
    uses_V = jnp.zeros(cfg.vocab, jnp.int32).at[codes_P].add(1)
    idle_V = jnp.where(uses_V > 0, 0, idle_V + 1)
    restart_V = idle_V >= cfg.dead_code_restart_steps
    distance_P = jnp.sum(jnp.square(z_PD - embed_codebook(cfg, params, codes_P)), axis=1)
    # The largest log-weights with Gumbel noise are such a sample (Kool et al. 2019, 1903.06059).
    count = min(cfg.vocab, len(z_PD))
    _, sampled_X = jax.lax.top_k(jnp.log(distance_P) + jax.random.gumbel(key, distance_P.shape), count)
    rank_V = jnp.cumsum(restart_V) - 1
    restart_V &= rank_V < count
    vectors_VD = z_PD[sampled_X[jnp.clip(rank_V, 0, count - 1)]]
    return CodeRestart(jnp.where(restart_V, 0, idle_V), restart_V, vectors_VD)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    # Full precision also where the backend multiplies float32 less precisely: a near tie decides a code.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def _table(cfg: VectorQuantizer, params: Params) -> jax.Array:
    return _unit(params["embedding"]) if cfg.normalize else params["embedding"]


def _logits(params: Params, z_BhwC: jax.Array) -> jax.Array:
    return _dot(z_BhwC, params["proj"]["kernel"]) + params["proj"]["bias"][None, None, None]


def _half(cfg: FiniteScalarQuantizer) -> jax.Array:
    """Return half the levels, rounded down, (1, 1, 1, D): the divisor of rounded values."""
    return jnp.asarray([level // 2 for level in cfg.levels], jnp.float32)[None, None, None]


def _basis(cfg: FiniteScalarQuantizer) -> jax.Array:
    """Return the place value of each channel in a code, (1, 1, 1, D); 1 for the first channel."""
    return jnp.asarray(np.cumprod([1, *cfg.levels[:-1]]), jnp.float32)[None, None, None]


def _bound(cfg: FiniteScalarQuantizer, z: jax.Array) -> jax.Array:
    """Bound `z` so that rounding gives `level` values per channel; 2309.15505, fig. 7 (eps 1e-3)."""
    levels = jnp.asarray(cfg.levels, jnp.float32)[None, None, None]
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = jnp.where(levels % 2 == 0, 0.5, 0.0)
    return jnp.tanh(z + jnp.arctanh(offset / half)) * half - offset
