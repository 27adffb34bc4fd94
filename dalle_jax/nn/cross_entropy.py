"""Cross-entropy over a large vocabulary that never holds the scores of all of it.

The columns of the head are taken in groups; the forward pass keeps a running maximum and sum per token, the
backward pass computes each group's scores again. Groups of columns and not of tokens, because the gradient of
each column is then complete after its group: over a mesh it is summed once, not once per group of tokens.
B batch, T tokens, D width, V vocabulary, C groups, E columns of a group: column v is number v // C of group v % C,
so that every group has its share of a vocabulary that is split over devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.parallel.sharding import constrain


def head_logits(x_BTD: jax.Array, kernel_DV: jax.Array, bias_V: jax.Array | None = None) -> jax.Array:
    """x times kernel, both in the compute dtype, and bias; sums and result, (B, T, V), in float32."""
    y_BTV = jnp.einsum("btd,dv->btv", x_BTD, kernel_DV, preferred_element_type=jnp.float32)
    if bias_V is not None:
        y_BTV = y_BTV + bias_V[None, None].astype(jnp.float32)
    return constrain(y_BTV, "batch", None, "vocab")


def cross_entropy(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    ids_BT: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    dtype: Any,
    vocab_chunk: int,
) -> jax.Array:
    """Mean over all tokens of -log softmax(x kernel + bias)[id], in nats, float32 scalar.

    Products in `dtype`. ids: int32 in [0, V). chunk: columns per group, about; with 0, or from V on, all at once.
    """
    x_BTD, kernel_DV = x_BTD.astype(dtype), kernel_DV.astype(dtype)
    width, vocab = kernel_DV.shape
    if not vocab_chunk or vocab_chunk >= vocab:
        y_BTV = head_logits(x_BTD, kernel_DV, bias_V)
        picked = jnp.take_along_axis(y_BTV, ids_BT[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(y_BTV, axis=-1) - picked)
    groups = -(-vocab // vocab_chunk)
    columns = -(-vocab // groups)
    columns = -(-columns // 128) * 128 if columns > 128 else columns  # whole lanes of a TPU
    bias_V = jnp.zeros(vocab, jnp.float32) if bias_V is None else bias_V
    kernel_DV = jnp.pad(kernel_DV, ((0, 0), (0, groups * columns - vocab)))
    bias_CE = jnp.pad(bias_V, (0, groups * columns - vocab)).reshape(columns, groups).T
    kernel_CDE = jnp.moveaxis(kernel_DV.reshape(width, columns, groups), -1, 0)
    kernel_CDE = constrain(kernel_CDE, None, "width", "vocab")
    return jnp.mean(_token_losses(vocab, x_BTD, kernel_CDE, bias_CE, ids_BT))


def _group(vocab: int, x_BTD, kernel_DE, bias_E, ids_BT, number, groups: int):
    """Scores of one group, with those of columns that only fill it up out of the way; and where the ids are."""
    columns = jnp.arange(kernel_DE.shape[1]) * groups + number
    y_BTE = head_logits(x_BTD, kernel_DE, bias_E)
    y_BTE = jnp.where((columns < vocab)[None, None], y_BTE, jnp.finfo(jnp.float32).min)
    return y_BTE, ids_BT[..., None] == columns[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(vocab: int, x_BTD, kernel_CDE, bias_CE, ids_BT):
    return _forward(vocab, x_BTD, kernel_CDE, bias_CE, ids_BT)[0]


def _forward(vocab, x_BTD, kernel_CDE, bias_CE, ids_BT):
    groups = len(kernel_CDE)

    def body(carry, group):
        high_BT, sum_BT, picked_BT = carry
        number, kernel_DE, bias_E = group
        y_BTE, here_BTE = _group(vocab, x_BTD, kernel_DE, bias_E, ids_BT, number, groups)
        new_BT = jnp.maximum(high_BT, y_BTE.max(axis=-1))
        sum_BT = sum_BT * jnp.exp(high_BT - new_BT) + jnp.exp(y_BTE - new_BT[..., None]).sum(axis=-1)
        return (new_BT, sum_BT, picked_BT + jnp.where(here_BTE, y_BTE, 0.0).sum(axis=-1)), None

    zeros = jnp.zeros(ids_BT.shape, jnp.float32)
    start = (zeros + jnp.finfo(jnp.float32).min, zeros, zeros)
    (high_BT, sum_BT, picked_BT), _ = jax.lax.scan(body, start, (jnp.arange(groups), kernel_CDE, bias_CE))
    total_BT = high_BT + jnp.log(sum_BT)
    return total_BT - picked_BT, (x_BTD, kernel_CDE, bias_CE, ids_BT, total_BT)


def _backward(vocab, kept, gradient_BT):
    x_BTD, kernel_CDE, bias_CE, ids_BT, total_BT = kept
    groups = len(kernel_CDE)

    def body(x_gradient_BTD, group):
        number, kernel_DE, bias_E = group
        y_BTE, here_BTE = _group(vocab, x_BTD, kernel_DE, bias_E, ids_BT, number, groups)
        off_BTE = (jnp.exp(y_BTE - total_BT[..., None]) - here_BTE) * gradient_BT[..., None]
        bias_gradient_E = off_BTE.sum(axis=(0, 1)).astype(bias_E.dtype)
        off_BTE = off_BTE.astype(x_BTD.dtype)
        back_BTD = jnp.einsum("bte,de->btd", off_BTE, kernel_DE, preferred_element_type=jnp.float32)
        kernel_gradient_DE = jnp.einsum("btd,bte->de", x_BTD, off_BTE, preferred_element_type=jnp.float32)
        kernel_gradient_DE = constrain(kernel_gradient_DE.astype(kernel_DE.dtype), "width", "vocab")
        return constrain(x_gradient_BTD + back_BTD, "batch", None, "embed"), (
            kernel_gradient_DE,
            bias_gradient_E,
        )

    zeros = constrain(jnp.zeros(x_BTD.shape, jnp.float32), "batch", None, "embed")
    x_gradient_BTD, head = jax.lax.scan(body, zeros, (jnp.arange(groups), kernel_CDE, bias_CE))
    return x_gradient_BTD.astype(x_BTD.dtype), *head, None


_token_losses.defvjp(_forward, _backward)
