"""What a Transformer is given: captions int32 (B, T) and codes int32 (B, P)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle_jax.config import TransformerConfig


def check_ids(cfg: TransformerConfig, text_BT: jax.Array, codes_BP: jax.Array) -> None:
    """Raises ValueError unless these are captions and the first P <= N codes for each."""
    if text_BT.ndim != 2 or text_BT.shape[1] != cfg.text_len:
        raise ValueError(f"text has shape {text_BT.shape}, want (batch, {cfg.text_len}); pad or cut captions")
    if codes_BP.ndim != 2 or codes_BP.shape[1] > cfg.num_codes or len(codes_BP) != len(text_BT):
        raise ValueError(
            f"codes have shape {codes_BP.shape}, want ({len(text_BT)}, {cfg.num_codes}) or fewer columns"
        )
    for name, ids in (("text", text_BT), ("codes", codes_BP)):
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} is {ids.dtype}, want int32 ids")
