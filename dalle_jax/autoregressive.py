"""Any Transformer from text to codes, told by its configuration: one stream (dalle.py), or an encoder and a decoder
(bart.py). The sampler, the training task and the commands know only these functions, which are documented there.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax

from dalle_jax import bart, dalle
from dalle_jax.config import BartConfig, TransformerConfig

Params = dict[str, Any]
Cache = dalle.Cache | bart.Cache


def _of(cfg: TransformerConfig) -> ModuleType:
    return bart if isinstance(cfg, BartConfig) else dalle


def init(cfg: TransformerConfig, key: jax.Array) -> Params:
    return _of(cfg).init(cfg, key)


def null_text(cfg: TransformerConfig) -> jax.Array:
    return _of(cfg).null_text(cfg)


def logits(cfg: TransformerConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array):
    return _of(cfg).logits(cfg, params, text_BT, codes_BN)


def loss(cfg: TransformerConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array):
    return _of(cfg).loss(cfg, params, text_BT, codes_BN, key)


def unstack(cfg: TransformerConfig, params: Params) -> Params:
    return _of(cfg).unstack(cfg, params)


def init_cache(cfg: TransformerConfig, captions: int, copies: int = 1, **options: bool) -> Cache:
    return _of(cfg).init_cache(cfg, captions, copies, **options)


def prefill(
    cfg: TransformerConfig, params: Params, text_CT: jax.Array, codes_BP: jax.Array | None = None, **options
):
    return _of(cfg).prefill(cfg, params, text_CT, codes_BP, **options)


def resize_cache(cfg: TransformerConfig, cache: Cache, size: int) -> Cache:
    return _of(cfg).resize_cache(cfg, cache, size)


def decode_step(cfg: TransformerConfig, params: Params, cache: Cache, code_B: jax.Array, place: jax.Array):
    return _of(cfg).decode_step(cfg, params, cache, code_B, place)
