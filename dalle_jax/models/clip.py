"""CLIP: a vision and a text Transformer with a joint embedding space (Radford et al. 2021, 2103.00020).

The architecture is the published one (ViT with a class token and a norm before the blocks; causal text tower, whose
output is taken at the end token), so published weights can be imported. Embeddings have length 1, so their product is
the cosine similarity. The contrastive loss compares all pairs of a batch; under a mesh the batch is the global one.
B batch, C captions, N images per caption or patches, K best images, H W image, S image size of the tower, T positions,
D width, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import ClipConfig, TowerConfig
from dalle_jax.nn.attention import Block
from dalle_jax.nn.module import apply_module, scan_layers
from dalle_jax.nn.products import einsum
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


def _block(cfg: ClipConfig, tower: TowerConfig) -> Block:
    out_std = 0.02 / math.sqrt(2 * tower.layers)
    width = tower.mlp_ratio * tower.dim
    return Block(tower.heads, width, False, out_std, jnp.dtype(cfg.dtype), activation=cfg.activation)


def init(cfg: ClipConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32: `vision`, `text` (blocks stacked over layers) and `logit_scale`."""
    names = ("patch", "class", "vision_pos", "vision_proj", "embed", "text_pos", "text_proj")
    *keys, k_vision, k_text = jax.random.split(key, len(names) + 2)
    k = dict(zip(names, keys, strict=True))

    def normal(name: str, std: float, *shape: int) -> jax.Array:
        return std * jax.random.normal(k[name], shape)

    def blocks(tower: TowerConfig, key: jax.Array) -> Params:
        x_BTD, mask_TT = jnp.zeros((1, 1, tower.dim)), jnp.ones((1, 1), bool)
        init_block = partial(_block(cfg, tower).init, x_BTD=x_BTD, mask_TS=mask_TT)
        return jax.vmap(lambda key: init_block(key)["params"])(jax.random.split(key, tower.layers))

    def norm(dim: int) -> Params:
        return {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}

    vision, text, std = cfg.vision, cfg.text, cfg.vision.dim**-0.5
    fan_in = 3 * cfg.patch_size**2
    patch = normal("patch", fan_in**-0.5, cfg.patch_size, cfg.patch_size, 3, vision.dim)
    return {
        "vision": {
            "patch": {"kernel": patch},
            "class_embed": normal("class", std, vision.dim),
            "pos": normal("vision_pos", std, 1 + cfg.num_patches, vision.dim),
            "norm_in": norm(vision.dim),
            "blocks": blocks(vision, k_vision),
            "norm_out": norm(vision.dim),
            "proj": {"kernel": normal("vision_proj", std, vision.dim, cfg.embed_dim)},
        },
        "text": {
            "embed": normal("embed", 0.02, cfg.text_vocab, text.dim),
            "pos": normal("text_pos", 0.01, cfg.text_len, text.dim),
            "blocks": blocks(text, k_text),
            "norm_out": norm(text.dim),
            "proj": {"kernel": normal("text_proj", text.dim**-0.5, text.dim, cfg.embed_dim)},
        },
        "logit_scale": jnp.float32(math.log(cfg.logit_scale_init)),
    }


# --- towers ----------------------------------------------------------------------------------------------


def preprocess(cfg: ClipConfig, images_BHWC: jax.Array) -> jax.Array:
    """Resize the short side to `image_size` (bicubic with antialiasing), crop the center, normalize the channels.

    Args:
      images_BHWC: float in [0, 1], any size.

    Returns:
      float32 (B, S, S, 3).

    Raises:
      ValueError: another shape or integers.
    """
    if images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
        raise ValueError(f"Expected images of shape (batch, height, width, 3), got {images_BHWC.shape}.")
    if not jnp.issubdtype(images_BHWC.dtype, jnp.floating):
        raise ValueError(f"Expected float images in [0, 1], got {images_BHWC.dtype}. Divide uint8 by 255.")
    x, size = images_BHWC.astype(jnp.float32), cfg.image_size
    batch, height, width = x.shape[:3]
    if (height, width) != (size, size):
        short = min(height, width)
        new_height, new_width = height * size // short, width * size // short
        x = jax.image.resize(x, (batch, new_height, new_width, 3), "cubic", antialias=True)
        top, left = round((new_height - size) / 2), round((new_width - size) / 2)
        x = jnp.clip(x[:, top : top + size, left : left + size], 0.0, 1.0)
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (cfg.pixel_mean, cfg.pixel_std))
    return (x - mean) / std


def encode_image(cfg: ClipConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Embed images.

    Args:
      images_BHWC: float in [0, 1], any size (`preprocess`).

    Returns:
      float32 (B, E), rows of length 1.

    Raises:
      ValueError: another shape or integers.
    """
    x, p, grid = preprocess(cfg, images_BHWC), cfg.patch_size, cfg.image_size // cfg.patch_size
    tower, batch = params["vision"], len(images_BHWC)
    # A convolution with windows that do not overlap is one matrix product.
    x = x.reshape(batch, grid, p, grid, p, 3).swapaxes(2, 3).reshape(batch, grid * grid, p * p * 3)
    kernel = tower["patch"]["kernel"].reshape(p * p * 3, cfg.vision.dim)
    x_BND = einsum("bnc,cd->bnd", x.astype(cfg.dtype), kernel.astype(cfg.dtype))
    class_B1D = jnp.broadcast_to(tower["class_embed"].astype(cfg.dtype), (batch, 1, cfg.vision.dim))
    x_BTD = jnp.concatenate([class_B1D, x_BND], axis=1).astype(jnp.float32) + tower["pos"][None]
    x_BTD = _norm(tower["norm_in"], constrain(x_BTD, "batch", None, "embed")).astype(cfg.dtype)
    mask_TT = np.ones((x_BTD.shape[1],) * 2, bool)
    x_BTD = _run(cfg, cfg.vision, tower["blocks"], x_BTD, mask_TT)
    return _project(tower, x_BTD[:, 0])


def encode_text(cfg: ClipConfig, params: Params, text_BT: jax.Array) -> jax.Array:
    """Embed captions.

    Args:
      text_BT: int32 (B, T) in [0, text_vocab): start token, pieces, end token; ids after it have no effect.

    Returns:
      float32 (B, E), rows of length 1.

    Raises:
      ValueError: another shape or dtype.
    """
    if text_BT.ndim != 2 or text_BT.shape[1] != cfg.text_len:
        raise ValueError(
            f"Expected text of shape (batch, {cfg.text_len}), got {text_BT.shape}. Pad or truncate captions."
        )
    if not jnp.issubdtype(text_BT.dtype, jnp.integer):
        raise ValueError(f"Expected int32 text ids, got {text_BT.dtype}.")
    tower = params["text"]
    x_BTD = tower["embed"][text_BT] + tower["pos"][None]
    x_BTD = constrain(x_BTD, "batch", None, "embed").astype(cfg.dtype)
    x_BTD = _run(cfg, cfg.text, tower["blocks"], x_BTD, np.tri(cfg.text_len, dtype=bool))
    end_B = jnp.argmax(text_BT == cfg.eos_id, axis=1)  # the first one
    x_BD = jnp.take_along_axis(x_BTD, end_B[:, None, None], axis=1)[:, 0]
    return _project(tower, x_BD)


def _run(
    cfg: ClipConfig, tower: TowerConfig, blocks: Params, x_BTD: jax.Array, mask_TT: np.ndarray
) -> jax.Array:
    """Run the blocks of a tower."""
    block, mask = _block(cfg, tower), jnp.asarray(mask_TT)

    def layer(x_BTD, layer_params):
        return apply_module(block, layer_params, x_BTD, mask)[0]

    return scan_layers(
        jax.checkpoint(layer) if cfg.remat == "full" else layer, x_BTD, blocks, cfg.scan_unroll
    )


def _norm(params: Params, x: jax.Array) -> jax.Array:
    return apply_module(nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32), params, x)


def _project(tower: Params, x_BD: jax.Array) -> jax.Array:
    """Apply the final norm and the projection, and scale to length 1, in float32."""
    x_BD = _norm(tower["norm_out"], x_BD)
    x_BE = jnp.einsum("bd,de->be", x_BD, tower["proj"]["kernel"], precision="highest")
    return x_BE / jnp.sqrt(jnp.sum(jnp.square(x_BE), axis=-1, keepdims=True) + 1e-12)


# --- the loss --------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _clip_above(x: jax.Array, maximum: float) -> jax.Array:
    """Compute `min(x, maximum)`; above the maximum only gradients that decrease `x` pass."""
    return jnp.minimum(x, maximum)


def _clip_above_fwd(x: jax.Array, maximum: float) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(x, maximum), x


def _clip_above_bwd(maximum: float, x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((x < maximum) | (grad > 0), grad, 0.0),)


_clip_above.defvjp(_clip_above_fwd, _clip_above_bwd)


def logit_scale(cfg: ClipConfig, params: Params) -> jax.Array:
    """Return the learned factor of the cosines, float32 scalar in (0, cfg.logit_scale_max]."""
    return jnp.exp(_clip_above(params["logit_scale"], math.log(cfg.logit_scale_max)))


def loss(
    cfg: ClipConfig, params: Params, images_BHWC: jax.Array, text_BT: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the contrastive loss, in nats: the mean cross-entropy of the caption of each image among those of the
    batch, and of the image of each caption (2103.00020, figure 3). For random embeddings it is about log B.

    Args:
      images_BHWC: float in [0, 1], any size, B of at least 2; under a mesh the rows of all devices.
      text_BT: int32 (B, T), the caption of each image.

    Returns:
      float32 scalar, and the metrics `scale`, and `image_to_text` and `text_to_image`, the top-1 accuracies.

    Raises:
      ValueError: different numbers of rows, or rows that `cfg.grad_cache_chunks` does not divide.
    """
    _check_pairs(images_BHWC, text_BT)
    image_BE = _in_chunks(cfg, partial(encode_image, cfg, params), images_BHWC)
    text_BE = _in_chunks(cfg, partial(encode_text, cfg, params), text_BT)
    scale = logit_scale(cfg, params)
    value, metrics = contrastive_loss(scale, image_BE, text_BE)
    return value, {"scale": scale, **metrics}


def contrastive_loss(
    scale: jax.Array, image_BE: jax.Array, text_BE: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute `loss` from embeddings of length 1, float32 (B, E), and the factor of their cosines."""
    cosine_BB = jnp.einsum("ae,be->ab", image_BE, text_BE, precision="highest")
    logits_BB = constrain(scale * cosine_BB, "batch", None)
    target_B, rows_B = jnp.diagonal(logits_BB), jnp.arange(len(logits_BB))
    image_to_text, text_to_image = (
        jnp.mean(jax.nn.logsumexp(logits_BB, axis=axis) - target_B) for axis in (1, 0)
    )
    accuracies = [jnp.mean(jnp.argmax(logits_BB, axis=axis) == rows_B) for axis in (1, 0)]
    metrics = dict(zip(("image_to_text", "text_to_image"), accuracies, strict=True))
    return (image_to_text + text_to_image) / 2, metrics


def _check_pairs(images_BHWC: jax.Array, text_BT: jax.Array) -> None:
    if len(images_BHWC) != len(text_BT):
        raise ValueError(
            f"Expected one caption per image, got {len(images_BHWC)} images and {len(text_BT)} captions."
        )


def _in_chunks(cfg: ClipConfig, encode: Callable[[jax.Array], jax.Array], x_B: jax.Array) -> jax.Array:
    """Encode `cfg.grad_cache_chunks` chunks of the rows one after the other and recompute them in the backward pass.

    Memory is that of one chunk; loss and gradient are those of all rows (Gao et al. 2021, 2101.06983).
    """
    n, rows = cfg.grad_cache_chunks, len(x_B)
    if n == 1:
        return encode(x_B)
    if rows % n:
        raise ValueError(
            f"Expected a batch size divisible by model.grad_cache_chunks {n}, got {rows}. Change one of them."
        )
    # Chunk i has the rows i, i + n, ...: under a mesh each device takes its part of a chunk from its own rows.
    x_NB = x_B.reshape(rows // n, n, *x_B.shape[1:]).swapaxes(0, 1)
    x_NB = constrain(x_NB, None, "batch", *(None,) * (x_B.ndim - 1))
    y_NBE = jax.lax.map(jax.checkpoint(encode), x_NB)
    return y_NBE.swapaxes(0, 1).reshape(rows, cfg.embed_dim)


# --- re-ranking ------------------------------------------------------------------------------------------


def similarity(cfg: ClipConfig, params: Params, images_BHWC: jax.Array, text_BT: jax.Array) -> jax.Array:
    """Compute the cosine similarity of each image and its caption.

    Args:
      images_BHWC: float in [0, 1], any size.
      text_BT: int32 (B, T), the caption of each image.

    Returns:
      float32 (B,) in [-1, 1].

    Raises:
      ValueError: different numbers of rows, or other shapes or dtypes.
    """
    _check_pairs(images_BHWC, text_BT)
    image_BE, text_BE = encode_image(cfg, params, images_BHWC), encode_text(cfg, params, text_BT)
    return jnp.einsum("be,be->b", image_BE, text_BE, precision="highest")


def rerank(
    cfg: ClipConfig, params: Params, images_CNHWC: jax.Array, text_CT: jax.Array, top: int
) -> tuple[jax.Array, jax.Array]:
    """Select the `top` images of each caption by cosine similarity, best first (2102.12092, 2.6).

    Args:
      images_CNHWC: float in [0, 1], N candidates per caption, any size.
      text_CT: int32 (C, T).
      top: K, in [1, N].

    Returns:
      int32 (C, K), indices of candidates (the first of equal ones), and float32 (C, K), their similarities.

    Raises:
      ValueError: `top` out of range, or other shapes or dtypes.
    """
    captions, candidates = images_CNHWC.shape[:2]
    if captions != len(text_CT):
        raise ValueError(
            f"Expected one set of images per caption, got {captions} sets and {len(text_CT)} captions."
        )
    if not 1 <= top <= candidates:
        raise ValueError(f"Expected top in [1, {candidates}], the candidates of a caption, got {top}.")
    image_BE = encode_image(cfg, params, images_CNHWC.reshape(-1, *images_CNHWC.shape[2:]))
    image_CNE = image_BE.reshape(captions, candidates, -1)
    text_CE = encode_text(cfg, params, text_CT)
    score_CN = jnp.einsum("cne,ce->cn", image_CNE, text_CE, precision="highest")
    score_CK, index_CK = jax.lax.top_k(score_CN, top)
    return index_CK.astype(jnp.int32), score_CK
