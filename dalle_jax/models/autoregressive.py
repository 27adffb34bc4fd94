"""Any Transformer from text to codes, told by its configuration: one stream (dalle/), or an encoder and a decoder
(bart.py). The sampler, the training task and the commands know only these functions; those without a word here are
documented there.
"""

from __future__ import annotations

from typing import Any

import jax

from dalle_jax.config import Quantization, TransformerConfig
from dalle_jax.models import bart, dalle
from dalle_jax.models.registry import TransformerFunctions, model_spec
from dalle_jax.nn.linear import fuse_qkv, quantize_kernels, tile_kernels, transpose_kernels
from dalle_jax.typing import Params

Cache = dalle.DalleCache | bart.BartCache


def _functions(cfg: TransformerConfig) -> TransformerFunctions:
    functions = model_spec(cfg).transformer
    if functions is None:
        raise ValueError(f"Expected the configuration of a Transformer, got {type(cfg).__name__}.")
    return functions


def init(cfg: TransformerConfig, key: jax.Array) -> Params:
    return _functions(cfg).init(cfg, key)


def null_text(cfg: TransformerConfig) -> jax.Array:
    return _functions(cfg).null_text(cfg)


def logits(cfg: TransformerConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array):
    return _functions(cfg).logits(cfg, params, text_BT, codes_BN)


def loss(cfg: TransformerConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array):
    return _functions(cfg).loss(cfg, params, text_BT, codes_BN, key)


def prepare_for_decode(
    cfg: TransformerConfig,
    params: Params,
    weights: Quantization | None = None,
    *,
    platform: str | None = None,
) -> Params:
    """The parameters as sampling wants them (nn/linear.py): the (decoder's) `blocks` a tuple of layers, with
    queries, keys and values in one matrix; matrices in the compute dtype, or quantised as `weights` says. A frozen
    text encoder stays in the compute dtype.

    Done once here instead of once per token. Parameters in this form are returned as they are. platform: "cpu", "gpu"
    or "tpu", whose way of laying matrices is taken; None asks the default device. Each gives the same results
    everywhere.
    Raises ValueError for unknown `weights`, where they are wanted of parameters that have the form already, and for
    parameters of another number of layers: an index past the end would give the last one again.
    """
    blocks = params["blocks"]
    layers = len(blocks) if isinstance(blocks, tuple) else len(jax.tree.leaves(blocks)[0])
    if layers != cfg.layers:
        raise ValueError(
            f"parameters of {layers} layers, cfg.layers is {cfg.layers}; give the cfg they were made with"
        )
    if isinstance(blocks, tuple):
        if weights is not None:
            raise ValueError("these parameters are unstacked already; quantise those of `init` or of a run")
        return params

    def one(path, leaf):
        return leaf.astype(cfg.dtype) if path[-1].key == "kernel" else leaf

    matrices = {n: params[n] for n in ("blocks", "image_head")}
    cast = (
        jax.tree_util.tree_map_with_path(one, matrices)
        if weights is None
        else quantize_kernels(matrices, weights)
    )
    platform = jax.default_backend() if platform is None else platform
    laid = {"gpu": transpose_kernels, "cpu": tile_kernels}.get(platform, lambda matrices: matrices)
    layers = (jax.tree.map(lambda a, i=i: a[i], cast["blocks"]) for i in range(cfg.layers))
    # The other rows that bart has are no codes.
    head = {name: x[..., : cfg.image_vocab] for name, x in cast["image_head"].items()}
    cast = {"blocks": tuple(laid(fuse_qkv(layer)) for layer in layers), "image_head": laid(head)}
    reads = {n: params[n] for n in ("t5", "text_proj") if n in params}
    return {**params, **jax.tree_util.tree_map_with_path(one, reads), **cast}


def init_cache(cfg: TransformerConfig, captions: int, copies: int = 1, **options: bool) -> Cache:
    return _functions(cfg).init_cache(cfg, captions, copies, **options)


def prefill(
    cfg: TransformerConfig, params: Params, text_CT: jax.Array, codes_BP: jax.Array | None = None, **options
):
    return _functions(cfg).prefill(cfg, params, text_CT, codes_BP, **options)


def resize_cache(cfg: TransformerConfig, cache: Cache, size: int) -> Cache:
    return _functions(cfg).resize_cache(cfg, cache, size)


def insert_into_cache(cfg: TransformerConfig, cache: Cache, begun: Cache, rows_X: jax.Array) -> Cache:
    return _functions(cfg).insert_into_cache(cfg, cache, begun, rows_X)


def decode_step(
    cfg: TransformerConfig,
    params: Params,
    cache: Cache,
    code_B: jax.Array,
    place: jax.Array,
):
    return _functions(cfg).decode_step(cfg, params, cache, code_B, place)


def decode_drafts(
    cfg: TransformerConfig, params: Params, cache: Cache, codes_BQ: jax.Array, place_B: jax.Array
):
    return _functions(cfg).decode_drafts(cfg, params, cache, codes_BQ, place_B)


def commit_drafts(
    cfg: TransformerConfig, cache: Cache, fresh: Any, place_B: jax.Array, count_B: jax.Array
) -> Cache:
    return _functions(cfg).commit_drafts(cfg, cache, fresh, place_B, count_B)
