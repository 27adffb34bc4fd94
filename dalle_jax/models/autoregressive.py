"""Autoregressive Transformers from text to image tokens, of every kind (models/registry.py): one stream of tokens
(dalle/), or an encoder and a decoder (bart.py).

Samplers, training tasks and commands call these functions; those without a docstring are documented in dalle/.
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


def logits(
    cfg: TransformerConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    return _functions(cfg).logits(cfg, params, text_BT, codes_BN)


def loss(
    cfg: TransformerConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    return _functions(cfg).loss(cfg, params, text_BT, codes_BN, key)


def prepare_for_decode(
    cfg: TransformerConfig,
    params: Params,
    quantization: Quantization | None = None,
    *,
    platform: str | None = None,
) -> Params:
    """Convert parameters to the form that `prefill` and `decode_step` take, once instead of once per token.

    The (decoder's) `blocks` become a tuple of layers, each with one fused kernel for queries, keys and values; kernels
    are cast to the compute dtype or quantized (nn/linear.py). A frozen text encoder is cast, not quantized. Parameters
    that already have this form are returned unchanged.

    Args:
      params: from `init`, or restored.
      quantization: 8-bit format of the kernels; None keeps the compute dtype.
      platform: "cpu", "gpu" or "tpu", whose kernel layout to use; None is the default backend. Results are the same
        with every layout.

    Returns:
      The parameters for decoding.

    Raises:
      ValueError: unknown `quantization`, quantization of parameters that are already converted, or another number of
        layers than `cfg.layers` (JAX clamps an index past the end, so the last layer would repeat).
    """
    blocks = params["blocks"]
    layers = len(blocks) if isinstance(blocks, tuple) else len(jax.tree.leaves(blocks)[0])
    if layers != cfg.layers:
        raise ValueError(
            f"Expected parameters of {cfg.layers} layers (cfg.layers), got {layers}. Use the cfg of their `init`."
        )
    if isinstance(blocks, tuple):
        if quantization is not None:
            raise ValueError(
                "Expected parameters from `init` or a run, got converted ones. Quantize the originals."
            )
        return params

    def cast_kernel(path, leaf):
        return leaf.astype(cfg.dtype) if path[-1].key == "kernel" else leaf

    def cast_kernels(tree: Params) -> Params:
        return jax.tree_util.tree_map_with_path(cast_kernel, tree)

    kernels = {name: params[name] for name in ("blocks", "image_head")}
    kernels = cast_kernels(kernels) if quantization is None else quantize_kernels(kernels, quantization)
    platform = jax.default_backend() if platform is None else platform
    to_layout = {"gpu": transpose_kernels, "cpu": tile_kernels}.get(platform, lambda kernels: kernels)
    unstacked = (jax.tree.map(lambda a, i=i: a[i], kernels["blocks"]) for i in range(cfg.layers))
    # BART's decoder vocabulary has more rows than there are codes.
    head = {name: x[..., : cfg.image_vocab] for name, x in kernels["image_head"].items()}
    text_encoder = {name: params[name] for name in ("t5", "text_proj") if name in params}
    return {
        **params,
        **cast_kernels(text_encoder),
        "blocks": tuple(to_layout(fuse_qkv(layer)) for layer in unstacked),
        "image_head": to_layout(head),
    }


def init_cache(
    cfg: TransformerConfig, captions: int, samples_per_caption: int = 1, *, use_cfg: bool = False
) -> Cache:
    return _functions(cfg).init_cache(cfg, captions, samples_per_caption, use_cfg=use_cfg)


def prefill(
    cfg: TransformerConfig,
    params: Params,
    text_CT: jax.Array,
    codes_BP: jax.Array | None = None,
    *,
    samples_per_caption: int = 1,
    use_cfg: bool = False,
) -> tuple[jax.Array, Cache]:
    return _functions(cfg).prefill(
        cfg, params, text_CT, codes_BP, samples_per_caption=samples_per_caption, use_cfg=use_cfg
    )


def resize_cache(cfg: TransformerConfig, cache: Cache, size: int) -> Cache:
    return _functions(cfg).resize_cache(cfg, cache, size)


def insert_into_cache(cfg: TransformerConfig, cache: Cache, prefilled: Cache, rows_X: jax.Array) -> Cache:
    return _functions(cfg).insert_into_cache(cfg, cache, prefilled, rows_X)


def decode_step(
    cfg: TransformerConfig, params: Params, cache: Cache, code_B: jax.Array, position: jax.Array | int
) -> tuple[jax.Array, Cache]:
    return _functions(cfg).decode_step(cfg, params, cache, code_B, position)


def decode_drafts(
    cfg: TransformerConfig, params: Params, cache: Cache, codes_BQ: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, Any]:
    return _functions(cfg).decode_drafts(cfg, params, cache, codes_BQ, position_B)


def commit_drafts(
    cfg: TransformerConfig, cache: Cache, draft_kvs: Any, position_B: jax.Array, num_accepted_B: jax.Array
) -> Cache:
    return _functions(cfg).commit_drafts(cfg, cache, draft_kvs, position_B, num_accepted_B)
