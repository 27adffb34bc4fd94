"""Checks of the inputs of a Transformer: captions int32 (B, T) and codes int32 (B, P)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dalle_jax.config import TransformerConfig


def check_ids(cfg: TransformerConfig, text_BT: jax.Array, codes_BP: jax.Array) -> None:
    """Check captions and the first P <= N codes for each.

    Ids out of range are found where the arrays are concrete. Under `jit` they are not, and a lookup clamps such ids to
    the last row of the embedding.

    Raises:
      ValueError: a wrong type, dtype or shape, or ids out of range.
    """
    for name, ids in (("text", text_BT), ("codes", codes_BP)):
        if not isinstance(ids, jax.Array | np.ndarray):
            raise ValueError(f"Expected {name} to be an array of int32 ids, got a {type(ids).__name__}.")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"Expected {name} of int32 ids, got {ids.dtype}.")
    if text_BT.ndim != 2 or text_BT.shape[1] != cfg.text_len:
        raise ValueError(
            f"Expected text of shape (batch, {cfg.text_len}), got {text_BT.shape}. Pad or truncate captions."
        )
    if codes_BP.ndim != 2 or codes_BP.shape[1] > cfg.num_codes or len(codes_BP) != len(text_BT):
        raise ValueError(
            f"Expected codes of shape ({len(text_BT)}, {cfg.num_codes}) or fewer columns, got {codes_BP.shape}."
        )
    _check_range("text", text_BT, cfg.text_vocab + cfg.text_len, "text_vocab + text_len")
    _check_range("codes", codes_BP, cfg.image_vocab, "image_vocab")


def check_prefix(
    cfg: TransformerConfig, text_CT: jax.Array, codes_BP: jax.Array | None, samples_per_caption: int
) -> jax.Array:
    """Check captions and the prefix codes of `samples_per_caption` adjacent rows for each.

    Returns:
      The prefix codes; int32 (B, 0) for None.

    Raises:
      ValueError: other shapes or dtypes, or a prefix of all codes.
    """
    rows = len(text_CT) * samples_per_caption
    if codes_BP is None:
        codes_BP = jnp.zeros((rows, 0), jnp.int32)
    check_ids(cfg, text_CT, codes_BP[::samples_per_caption])
    if len(codes_BP) != rows:
        raise ValueError(
            f"Expected prefix codes of {rows} rows, {samples_per_caption} per caption, got shape {codes_BP.shape}."
        )
    if codes_BP.shape[1] >= cfg.num_codes:
        raise ValueError(
            f"Expected a prefix of fewer than {cfg.num_codes} codes, got {codes_BP.shape[1]}. "
            "Use a shorter prefix, so that a code is left to sample."
        )
    return codes_BP


def _check_range(name: str, ids: jax.Array | np.ndarray, end: int, field: str) -> None:
    if isinstance(ids, Tracer) or not ids.size:
        return
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return
    values = np.asarray(ids)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= end:
        raise ValueError(f"Expected {name} in [0, {end}), which is {field}, got ids from {low} to {high}.")
