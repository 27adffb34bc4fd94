"""Cross-entropy over a large vocabulary, computed in chunks so that the logits never exist as a whole.

The forward pass scans over chunks of the head's columns with a running maximum and sum per token; the backward pass
recomputes the logits of each chunk. Chunks are of columns and not of tokens, because the gradient of a column is then
complete after its chunk: over a mesh it is reduced once, not once per chunk of tokens.
B batch, T tokens, D width, V vocabulary, C chunks, E columns of a chunk. Column v is number v // C of chunk v % C, so
that every chunk has columns on every device of a sharded vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.nn.products import einsum
from dalle_jax.parallel.sharding import constrain


def _head_logits(x_BTD: jax.Array, kernel_DV: jax.Array, bias_V: jax.Array | None = None) -> jax.Array:
    """Compute logits, float32 (B, T, V), of `x_BTD` and `kernel_DV` in the compute dtype; sums are in float32."""
    y_BTV = einsum("btd,dv->btv", x_BTD, kernel_DV, out_dtype=jnp.float32)
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
    """Compute the mean over all tokens of -log softmax(x kernel + bias)[id].

    Args:
      x_BTD: hidden states.
      kernel_DV: of the head.
      ids_BT: int32 in [0, V), the targets.
      bias_V: of the head, or None.
      dtype: compute dtype of the products.
      vocab_chunk: approximate columns per chunk; 0, or V and more, computes all logits at once.

    Returns:
      float32 scalar, in nats.
    """
    x_BTD, kernel_DV = x_BTD.astype(dtype), kernel_DV.astype(dtype)
    width, vocab = kernel_DV.shape
    if not vocab_chunk or vocab_chunk >= vocab:
        y_BTV = _head_logits(x_BTD, kernel_DV, bias_V)
        target_BT = jnp.take_along_axis(y_BTV, ids_BT[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(y_BTV, axis=-1) - target_BT)
    chunks = -(-vocab // vocab_chunk)
    columns = -(-vocab // chunks)
    columns = -(-columns // 128) * 128 if columns > 128 else columns  # a multiple of a TPU's lanes
    bias_V = jnp.zeros(vocab, jnp.float32) if bias_V is None else bias_V
    kernel_DV = jnp.pad(kernel_DV, ((0, 0), (0, chunks * columns - vocab)))
    bias_CE = jnp.pad(bias_V, (0, chunks * columns - vocab)).reshape(columns, chunks).T
    kernel_CDE = jnp.moveaxis(kernel_DV.reshape(width, columns, chunks), -1, 0)
    kernel_CDE = constrain(kernel_CDE, None, "width", "vocab")
    return jnp.mean(_token_losses(vocab, x_BTD, kernel_CDE, bias_CE, ids_BT))


def _chunk_logits(
    vocab: int,
    x_BTD: jax.Array,
    kernel_DE: jax.Array,
    bias_E: jax.Array,
    ids_BT: jax.Array,
    index: jax.Array,
    num_chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """Return the logits of a chunk, minimal for padding columns, and where they are targets; (B, T, E) each."""
    columns_E = jnp.arange(kernel_DE.shape[1]) * num_chunks + index
    y_BTE = _head_logits(x_BTD, kernel_DE, bias_E)
    y_BTE = jnp.where((columns_E < vocab)[None, None], y_BTE, jnp.finfo(jnp.float32).min)
    return y_BTE, ids_BT[..., None] == columns_E[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(vocab: int, x_BTD, kernel_CDE, bias_CE, ids_BT):
    """Return -log softmax of each target, float32 (B, T)."""
    return _forward(vocab, x_BTD, kernel_CDE, bias_CE, ids_BT)[0]


def _forward(vocab, x_BTD, kernel_CDE, bias_CE, ids_BT):
    num_chunks = len(kernel_CDE)

    def body(carry, chunk):
        max_BT, sum_BT, target_BT = carry
        index, kernel_DE, bias_E = chunk
        y_BTE, is_target_BTE = _chunk_logits(vocab, x_BTD, kernel_DE, bias_E, ids_BT, index, num_chunks)
        new_max_BT = jnp.maximum(max_BT, y_BTE.max(axis=-1))
        sum_BT = sum_BT * jnp.exp(max_BT - new_max_BT) + jnp.exp(y_BTE - new_max_BT[..., None]).sum(axis=-1)
        return (new_max_BT, sum_BT, target_BT + jnp.where(is_target_BTE, y_BTE, 0.0).sum(axis=-1)), None

    zeros = jnp.zeros(ids_BT.shape, jnp.float32)
    initial = (zeros + jnp.finfo(jnp.float32).min, zeros, zeros)
    (max_BT, sum_BT, target_BT), _ = jax.lax.scan(
        body, initial, (jnp.arange(num_chunks), kernel_CDE, bias_CE)
    )
    logsumexp_BT = max_BT + jnp.log(sum_BT)
    return logsumexp_BT - target_BT, (x_BTD, kernel_CDE, bias_CE, ids_BT, logsumexp_BT)


def _backward(vocab, residuals, grad_BT):
    x_BTD, kernel_CDE, bias_CE, ids_BT, logsumexp_BT = residuals
    num_chunks = len(kernel_CDE)

    def body(x_grad_BTD, chunk):
        index, kernel_DE, bias_E = chunk
        y_BTE, is_target_BTE = _chunk_logits(vocab, x_BTD, kernel_DE, bias_E, ids_BT, index, num_chunks)
        y_grad_BTE = (jnp.exp(y_BTE - logsumexp_BT[..., None]) - is_target_BTE) * grad_BT[..., None]
        bias_grad_E = y_grad_BTE.sum(axis=(0, 1)).astype(bias_E.dtype)
        y_grad_BTE = y_grad_BTE.astype(x_BTD.dtype)
        chunk_grad_BTD = einsum("bte,de->btd", y_grad_BTE, kernel_DE, out_dtype=jnp.float32)
        kernel_grad_DE = einsum("btd,bte->de", x_BTD, y_grad_BTE, out_dtype=jnp.float32)
        kernel_grad_DE = constrain(kernel_grad_DE.astype(kernel_DE.dtype), "width", "vocab")
        x_grad_BTD = constrain(x_grad_BTD + chunk_grad_BTD, "batch", None, "embed")
        return x_grad_BTD, (kernel_grad_DE, bias_grad_E)

    zeros = constrain(jnp.zeros(x_BTD.shape, jnp.float32), "batch", None, "embed")
    x_grad_BTD, head_grads = jax.lax.scan(body, zeros, (jnp.arange(num_chunks), kernel_CDE, bias_CE))
    return x_grad_BTD.astype(x_BTD.dtype), *head_grads, None


_token_losses.defvjp(_forward, _backward)
