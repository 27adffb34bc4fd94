"""A pre-norm Transformer block whose attention runs over the positions given, or as its caller says.

Its choices make it the block of the paper or of a public family: layer or RMS norms, before the branches only or
after them too, kinds of MLP, with biases or without, turned queries and keys or none.
B batch, T positions computed now, S positions seen, D width, H heads, K width of a head, F width of the MLP.
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
from dalle_jax.nn.rope import apply_rope
from dalle_jax.parallel.sharding import constrain

# Of the MLP; swiglu and geglu are gated (2002.05202), geglu by the tanh form, as T5 has it.
Activation = Literal["gelu-tanh", "gelu", "quick-gelu", "swiglu", "geglu"]
Norm = Literal["layer", "rms"]
NORM_EPSILON = 1e-5  # of norms, where nothing else is said

# Names under which a remat policy finds queries, keys and values, what attention makes of them, and the stream
# between attention and MLP; each has the size of the stream.
QKV, ATTN_OUT, POST_ATTN = "qkv", "attended", "middle"

# Queries, keys and values of the positions given, (B, T, H, K) each, to what they attend to, (B, T, H, K), and
# whatever the caller wants back.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def dense_attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention, scores and softmax in float32; a position sees where `mask`, (T, S) or (B, T, S), is True.

    Every row of the mask must see something. Returns (B, T, H, K) in the dtype of `v`.
    """
    scale = 1.0 / math.sqrt(q_BTHK.shape[-1])
    att_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK * scale, k_BSHK, preferred_element_type=jnp.float32)
    mask_BHTS = mask[None, None] if mask.ndim == 2 else mask[:, None]
    att_BHTS = jnp.where(mask_BHTS, att_BHTS, jnp.finfo(jnp.float32).min)
    att_BHTS = jax.nn.softmax(att_BHTS, axis=-1).astype(v_BSHK.dtype)
    return jnp.einsum("bhts,bshk->bthk", att_BHTS, v_BSHK)


def _rms_norm(x: jax.Array, scale_K: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
    return (x32 * scale_K.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def make_norm(kind: Norm, name: str | None = None, epsilon: float = NORM_EPSILON) -> nn.Module:
    """A norm over the last axis, in float32."""
    make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind]
    return make(epsilon=epsilon, dtype=jnp.float32, name=name)


def _products(module: nn.Module, names: tuple[str, ...], x: jax.Array, width: int) -> list[jax.Array]:
    """What Dense layers of a module make of the same input, or the one matrix to which sampling has joined them."""
    if module.has_variable("params", joined := "_".join(names)):
        return fused_linear({joined: module.get_variable("params", joined)}, names, x, module.dtype)
    init = nn.initializers.normal(0.02)
    layers = (Dense(width, module.biases, module.dtype, init, name=name) for name in names)
    return [layer(x) for layer in layers]


class Attention(nn.Module):
    heads: int
    qk_norm: bool
    out_std: float
    dtype: Any
    biases: bool = True

    @nn.compact
    def __call__(self, x_BTD, mask_TS, attention_fn: AttentionFn | None = None, rope=None):
        *lead, dim = x_BTD.shape
        width = dim // self.heads

        # Flat kernels (D, H * K): a stored axis of K = 64 would fill half of a TPU's lanes, and three of them
        # split over heads where one of (D, 3 * H * K) would be cut across queries, keys and values.
        def split(y_BTD):
            y_BTD = checkpoint_name(y_BTD, QKV)
            return constrain(y_BTD.reshape(*lead, self.heads, width), "batch", None, "heads", None)

        q, k, v = map(split, _products(self, ("q", "k", "v"), x_BTD, dim))
        if self.qk_norm:
            q = _rms_norm(q, self.param("q_scale", nn.initializers.ones, (width,)))
            k = _rms_norm(k, self.param("k_scale", nn.initializers.ones, (width,)))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        cache = None
        with jax.named_scope("attend"):
            if attention_fn is None:
                y_BTHK = dense_attention(q, k, v, mask_TS)
            else:
                y_BTHK, cache = attention_fn(q, k, v)
        init = nn.initializers.normal(self.out_std)
        out = Dense(dim, self.biases, self.dtype, init, name="out")
        return out(checkpoint_name(y_BTHK.reshape(*lead, dim), ATTN_OUT)), cache


def activate(name: Activation, x: jax.Array) -> jax.Array:
    match name:
        case "gelu-tanh":
            return nn.gelu(x, approximate=True)
        case "gelu":
            return nn.gelu(x, approximate=False)
        case "quick-gelu":  # of OpenAI's CLIP
            return x * jax.nn.sigmoid(1.702 * x)
    raise ValueError(f"activation is {name!r}; want one of {', '.join(get_args(Activation))}")


GATED_ACTIVATIONS = {"swiglu": nn.silu, "geglu": nn.gelu}


class MLP(nn.Module):
    width: int
    out_std: float
    dtype: Any
    activation: Activation = "gelu-tanh"
    biases: bool = True

    @nn.compact
    def __call__(self, x_BTD):
        def dense(name, width, std):
            init = nn.initializers.normal(std)
            return Dense(width, self.biases, self.dtype, init, name=name)

        if self.activation in GATED_ACTIVATIONS:
            both = _products(self, ("gate", "up"), x_BTD, self.width)
            gate_BTF, x_BTF = (constrain(y_BTF, "batch", None, "mlp") for y_BTF in both)
            x_BTF = GATED_ACTIVATIONS[self.activation](gate_BTF) * x_BTF
        else:
            x_BTF = constrain(dense("up", self.width, 0.02)(x_BTD), "batch", None, "mlp")
            x_BTF = activate(self.activation, x_BTF)
        return dense("down", x_BTD.shape[-1], self.out_std)(x_BTF)


class Block(nn.Module):
    """Norm, attention, sum; norm, MLP, sum. Returns the new stream and what `look` gave besides, or None.

    look: attention instead of the dense one under `mask_TS`, as sampling has it over a cache (cache.py).
    turns: of queries and keys, where positions are rotary (rotary.py).
    """

    heads: int
    mlp_width: int
    qk_norm: bool
    out_std: float  # of the kernels that write into the residual stream
    dtype: Any
    activation: Activation = "gelu-tanh"
    norm: Norm = "layer"
    sandwich_norm: bool = False  # a norm of what attention and MLP give too, before each sum
    biases: bool = True
    epsilon: float = NORM_EPSILON  # of the norms

    @nn.compact
    def __call__(self, x_BTD, mask_TS=None, attention_fn: AttentionFn | None = None, rope=None):
        def normed(name, x_BTD):
            return make_norm(self.norm, name, self.epsilon)(x_BTD).astype(self.dtype)

        attention = Attention(self.heads, self.qk_norm, self.out_std, self.dtype, self.biases, name="attn")
        y_BTD, cache = attention(normed("norm_attn", x_BTD), mask_TS, attention_fn, rope)
        if self.sandwich_norm:
            y_BTD = normed("norm_attn_out", y_BTD)
        x_BTD = checkpoint_name(constrain(x_BTD + y_BTD, "batch", None, "embed"), POST_ATTN)
        mlp = MLP(self.mlp_width, self.out_std, self.dtype, self.activation, self.biases, name="mlp")
        y_BTD = mlp(normed("norm_mlp", x_BTD))
        if self.sandwich_norm:
            y_BTD = normed("norm_mlp_out", y_BTD)
        return constrain(x_BTD + y_BTD, "batch", None, "embed"), cache
