"""What a Transformer is given: captions int32 (B, T) and codes int32 (B, P)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import TransformerConfig


def check_ids(cfg: TransformerConfig, text_BT: jax.Array, codes_BP: jax.Array) -> None:
    """Raises ValueError unless these are captions and the first P <= N codes for each.

    Ids that there are no tokens for are seen where the arrays have values. Under `jit` they have none, and a lookup
    takes the last row of a table for them.
    """
    for name, ids in (("text", text_BT), ("codes", codes_BP)):
        if not hasattr(ids, "dtype"):
            raise ValueError(f"{name} is a {type(ids).__name__}, want an array of int32 ids")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} is {ids.dtype}, want int32 ids")
    if text_BT.ndim != 2 or text_BT.shape[1] != cfg.text_len:
        raise ValueError(f"text has shape {text_BT.shape}, want (batch, {cfg.text_len}); pad or cut captions")
    if codes_BP.ndim != 2 or codes_BP.shape[1] > cfg.num_codes or len(codes_BP) != len(text_BT):
        raise ValueError(
            f"codes have shape {codes_BP.shape}, want ({len(text_BT)}, {cfg.num_codes}) or fewer columns"
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
            f"Expected a prefix of fewer than {cfg.num_codes} codes, got {codes_BP.shape[1]}. Nothing is left to sample."
        )
    return codes_BP


def _check_range(name: str, ids: jax.Array, end: int, field: str) -> None:
    try:
        if not ids.size or not getattr(ids, "is_fully_addressable", True):
            return
        ids = np.asarray(ids)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= end:
        raise ValueError(f"{name} has ids from {least} to {most}, want ids in [0, {end}), which is {field}")
