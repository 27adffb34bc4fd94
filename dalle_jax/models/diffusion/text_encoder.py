"""The text Transformer of a diffusion model (Nichol et al. 2021, 2112.10741, 2.2).

Attention is bidirectional. Text ids lie in [0, text_vocab) for pieces and at text_vocab + i for the learned pad token
of position i, so padding needs no mask. B batch, T text positions, D width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import TextEncoderConfig
from dalle_jax.nn.attention import Block
from dalle_jax.nn.module import apply_module, scan_layers
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


class EncodedText(NamedTuple):
    """Encoded captions.

    Attributes:
      states: (B, T, D) in the compute dtype, for attention.
      mean: float32 (B, D), added to the time embedding.
    """

    states: jax.Array
    mean: jax.Array


def _block(cfg: TextEncoderConfig, dtype: Any) -> Block:
    return Block(cfg.heads, cfg.mlp_ratio * cfg.dim, False, 0.02 / math.sqrt(2 * cfg.layers), dtype)


def init(cfg: TextEncoderConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32; those of the blocks are stacked over a leading axis of layers."""
    k_embed, k_pos, k_blocks = jax.random.split(key, 3)
    x_BTD, mask_TT = jnp.zeros((1, 1, cfg.dim)), jnp.ones((1, 1), bool)
    init_blocks = jax.vmap(lambda key: _block(cfg, jnp.float32).init(key, x_BTD, mask_TT)["params"])
    return {
        "embed": 0.02 * jax.random.normal(k_embed, (cfg.text_vocab + cfg.text_len, cfg.dim)),
        "pos": 0.02 * jax.random.normal(k_pos, (cfg.text_len, cfg.dim)),
        "blocks": init_blocks(jax.random.split(k_blocks, cfg.layers)),
        "norm_out": {"scale": jnp.ones(cfg.dim), "bias": jnp.zeros(cfg.dim)},
    }


def null_text(cfg: TextEncoderConfig) -> jax.Array:
    """Return the null caption, int32 (T,): the pad token at every position."""
    return cfg.text_vocab + jnp.arange(cfg.text_len, dtype=jnp.int32)


def encode_text(cfg: TextEncoderConfig, params: Params, text_BT: jax.Array, dtype: Any) -> EncodedText:
    """Encode captions.

    Args:
      text_BT: int32 in [0, text_vocab + text_len).
      dtype: compute dtype.

    Raises:
      ValueError: another shape or dtype.
    """
    if (
        text_BT.ndim != 2
        or text_BT.shape[1] != cfg.text_len
        or not jnp.issubdtype(text_BT.dtype, jnp.integer)
    ):
        raise ValueError(
            f"Expected text of integers (batch, {cfg.text_len}), got {text_BT.dtype} {text_BT.shape}."
        )
    x_BTD = params["embed"][text_BT] + params["pos"][None]
    x_BTD = constrain(x_BTD, "batch", None, "embed").astype(dtype)
    mask_TT, block = jnp.ones((cfg.text_len, cfg.text_len), bool), _block(cfg, dtype)
    x_BTD = scan_layers(lambda x, layer: apply_module(block, layer, x, mask_TT)[0], x_BTD, params["blocks"])
    norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32)
    x_BTD = apply_module(norm, params["norm_out"], x_BTD)
    return EncodedText(x_BTD.astype(dtype), jnp.mean(x_BTD, axis=1))
