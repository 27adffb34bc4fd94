"""A pre-norm Transformer block with dense attention, or with an attention function of its caller.

Its options cover the block of the paper (Ramesh et al. 2021, 2102.12092) and of the public families: layer or RMS
norms, before the branches or also after them (sandwich norm), the MLP's activation, biases, QK-norm and RoPE.
B batch, T query positions, S key positions, D width, H heads, K width of a head, F width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dalle_jax.nn.linear import Dense, fused_linear
from dalle_jax.nn.norm import NORM_EPSILON, Norm, make_norm
from dalle_jax.nn.products import einsum
from dalle_jax.nn.rope import apply_rope
from dalle_jax.parallel.sharding import constrain

# swiglu and geglu are gated (Shazeer 2020, 2002.05202); geglu has the tanh form of GELU, as in T5.
Activation = Literal["gelu-tanh", "gelu", "quick-gelu", "swiglu", "geglu"]

# Names of values that a remat policy can save: queries, keys and values; the output of attention; the residual stream
# between attention and MLP. Each has the size of the residual stream.
QKV, ATTN_OUT, POST_ATTN = "qkv", "attn_out", "post_attn"

# Maps queries, keys and values, (B, T, H, K) each, to the output of attention, (B, T, H, K), and a second value that
# the block returns, such as a KV cache.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def dense_attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute softmax attention, with scores and softmax in float32.

    Args:
      q_BTHK: queries.
      k_BSHK: keys.
      v_BSHK: values.
      mask: bool (T, S) or (B, T, S), True where a query attends to a key; at least one key for each query.

    Returns:
      (B, T, H, K) in the dtype of the values.
    """
    scale = 1.0 / math.sqrt(q_BTHK.shape[-1])
    att_BHTS = einsum("bthk,bshk->bhts", q_BTHK * scale, k_BSHK, out_dtype=jnp.float32)
    mask_BHTS = mask[None, None] if mask.ndim == 2 else mask[:, None]
    att_BHTS = jnp.where(mask_BHTS, att_BHTS, jnp.finfo(jnp.float32).min)
    att_BHTS = jax.nn.softmax(att_BHTS, axis=-1).astype(v_BSHK.dtype)
    return einsum("bhts,bshk->bthk", att_BHTS, v_BSHK)


def _rms_norm(x: jax.Array, scale_K: jax.Array) -> jax.Array:
    """Apply QK-norm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
    return (x32 * scale_K.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _apply_linears(
    module: Attention | MLP, names: tuple[str, ...], x: jax.Array, width: int
) -> list[jax.Array]:
    """Apply Dense layers to the same input, or the one matrix that `fuse_qkv` has joined them to."""
    if module.has_variable("params", fused := "_".join(names)):
        return fused_linear({fused: module.get_variable("params", fused)}, names, x, module.dtype)
    init = nn.initializers.normal(0.02)
    layers = (Dense(width, module.biases, module.dtype, init, name=name) for name in names)
    return [layer(x) for layer in layers]


class Attention(nn.Module):
    """Multi-head self-attention with optional QK-norm and RoPE.

    Called with x_BTD and either a mask, bool (T, S), or an `attention_fn`. Returns (B, T, D) and the second value of
    `attention_fn`, or None.
    """

    heads: int
    qk_norm: bool
    out_std: float
    dtype: Any
    biases: bool = True

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_TS: jax.Array | None = None,
        attention_fn: AttentionFn | None = None,
        rope: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        *lead, dim = x_BTD.shape
        width = dim // self.heads

        # Kernels are flat, (D, H * K): an axis of K = 64 would fill half of a TPU's lanes. They are three, each sharded
        # over heads: one kernel of (D, 3 * H * K) would be split across queries, keys and values.
        def split(y_BTD):
            y_BTD = checkpoint_name(y_BTD, QKV)
            return constrain(y_BTD.reshape(*lead, self.heads, width), "batch", None, "heads", None)

        q, k, v = map(split, _apply_linears(self, ("q", "k", "v"), x_BTD, dim))
        if self.qk_norm:
            q = _rms_norm(q, self.param("q_scale", nn.initializers.ones, (width,)))
            k = _rms_norm(k, self.param("k_scale", nn.initializers.ones, (width,)))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        cache = None
        with jax.named_scope("attend"):
            if attention_fn is None:
                assert mask_TS is not None
                y_BTHK = dense_attention(q, k, v, mask_TS)
            else:
                y_BTHK, cache = attention_fn(q, k, v)
        init = nn.initializers.normal(self.out_std)
        out = Dense(dim, self.biases, self.dtype, init, name="out")
        return out(checkpoint_name(y_BTHK.reshape(*lead, dim), ATTN_OUT)), cache


def _activate(name: Activation, x: jax.Array) -> jax.Array:
    """Apply an activation without a gate.

    Raises:
      ValueError: the name is unknown or of a gated activation.
    """
    match name:
        case "gelu-tanh":
            return nn.gelu(x, approximate=True)
        case "gelu":
            return nn.gelu(x, approximate=False)
        case "quick-gelu":  # of OpenAI's CLIP
            return x * jax.nn.sigmoid(1.702 * x)
    raise ValueError(f"Expected activation to be one of {', '.join(get_args(Activation))}, got {name!r}.")


_GATED_ACTIVATIONS = {"swiglu": nn.silu, "geglu": nn.gelu}


class MLP(nn.Module):
    """Two linear layers with an activation between them, or three with a gate; maps (B, T, D) to (B, T, D)."""

    width: int
    out_std: float
    dtype: Any
    activation: Activation = "gelu-tanh"
    biases: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        def dense(name: str, width: int, std: float) -> Dense:
            init = nn.initializers.normal(std)
            return Dense(width, self.biases, self.dtype, init, name=name)

        if self.activation in _GATED_ACTIVATIONS:
            both = _apply_linears(self, ("gate", "up"), x_BTD, self.width)
            gate_BTF, x_BTF = (constrain(y_BTF, "batch", None, "mlp") for y_BTF in both)
            x_BTF = _GATED_ACTIVATIONS[self.activation](gate_BTF) * x_BTF
        else:
            x_BTF = constrain(dense("up", self.width, 0.02)(x_BTD), "batch", None, "mlp")
            x_BTF = _activate(self.activation, x_BTF)
        return dense("down", x_BTD.shape[-1], self.out_std)(x_BTF)


class Block(nn.Module):
    """A pre-norm Transformer block.

    Called with the residual stream, (B, T, D), and either a mask, bool (T, S), for dense attention, or an
    `attention_fn`, such as attention over a KV cache (kv_cache.py); `rope` are the rotation tables of queries and keys
    (rope.py). Returns the new residual stream and the second value of `attention_fn`, or None.
    """

    heads: int
    mlp_width: int
    qk_norm: bool
    out_std: float  # of the kernels that write into the residual stream
    dtype: Any
    activation: Activation = "gelu-tanh"
    norm: Norm = "layer"
    sandwich_norm: bool = False  # a norm after attention and after the MLP too, before each sum
    biases: bool = True
    epsilon: float = NORM_EPSILON  # of the norms

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_TS: jax.Array | None = None,
        attention_fn: AttentionFn | None = None,
        rope: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        def apply_norm(name: str, x_BTD: jax.Array) -> jax.Array:
            return make_norm(self.norm, name, self.epsilon)(x_BTD).astype(self.dtype)

        attention = Attention(self.heads, self.qk_norm, self.out_std, self.dtype, self.biases, name="attn")
        y_BTD, cache = attention(apply_norm("norm_attn", x_BTD), mask_TS, attention_fn, rope)
        if self.sandwich_norm:
            y_BTD = apply_norm("norm_attn_out", y_BTD)
        x_BTD = checkpoint_name(constrain(x_BTD + y_BTD, "batch", None, "embed"), POST_ATTN)
        mlp = MLP(self.mlp_width, self.out_std, self.dtype, self.activation, self.biases, name="mlp")
        y_BTD = mlp(apply_norm("norm_mlp", x_BTD))
        if self.sandwich_norm:
            y_BTD = apply_norm("norm_mlp_out", y_BTD)
        return constrain(x_BTD + y_BTD, "batch", None, "embed"), cache
