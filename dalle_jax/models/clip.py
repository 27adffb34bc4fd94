"""CLIP: a vision and a text Transformer whose vectors agree where a caption says what a picture shows (Radford et
al. 2021, arXiv 2103.00020).

The architecture is the published one (ViT with a class token and a norm before the blocks; causal text tower,
read at the end token), so its weights fit. Vectors have length 1: their product is the cosine. Training pulls the
pairs of a batch together and all other combinations apart; under a mesh the batch is the global one.
B batch, C captions, N pictures for each, K kept, H W picture, S side that the tower sees, P patch, T positions, D
width, E common space, L layers, V tokens.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import ClipConfig, TowerConfig
from dalle_jax.nn.attention import Block
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


def _block(cfg: ClipConfig, tower: TowerConfig) -> Block:
    out_std = 0.02 / math.sqrt(2 * tower.layers)
    width = tower.mlp_ratio * tower.dim
    return Block(tower.heads, width, False, out_std, jnp.dtype(cfg.dtype), activation=cfg.activation)


def init(cfg: ClipConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: `vision`, `text` (their blocks stacked over layers) and `logit_scale`."""
    names = ("patch", "class", "vision_pos", "vision_proj", "embed", "text_pos", "text_proj")
    *keys, k_vision, k_text = jax.random.split(key, len(names) + 2)
    k = dict(zip(names, keys, strict=True))

    def normal(name: str, std: float, *shape: int) -> jax.Array:
        return std * jax.random.normal(k[name], shape)

    def blocks(tower: TowerConfig, key: jax.Array) -> Params:
        x_BTD, mask_TT = jnp.zeros((1, 1, tower.dim)), jnp.ones((1, 1), bool)
        one = partial(_block(cfg, tower).init, x_BTD=x_BTD, mask_TS=mask_TT)
        return jax.vmap(lambda key: one(key)["params"])(jax.random.split(key, tower.layers))

    def norm(dim: int) -> Params:
        return {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}

    vision, text, std = cfg.vision, cfg.text, cfg.vision.dim**-0.5
    colours = 3 * cfg.patch_size**2
    patch = normal("patch", colours**-0.5, cfg.patch_size, cfg.patch_size, 3, vision.dim)
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
    """Pictures as the vision tower sees them: short side to `image_size` (bicubic, smoothed where it shrinks),
    middle square, each channel by the mean and deviation of the training pictures.

    images_BHWC: float in [0, 1], any size. Returns float32 (B, S, S, 3). Raises ValueError for another shape or
    for integers.
    """
    if images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
        raise ValueError(f"pictures have shape {images_BHWC.shape}, want (batch, height, width, 3)")
    if not jnp.issubdtype(images_BHWC.dtype, jnp.floating):
        raise ValueError(f"pictures are {images_BHWC.dtype}, want floats in [0, 1]; divide bytes by 255")
    x, size = images_BHWC.astype(jnp.float32), cfg.image_size
    batch, height, width = x.shape[:3]
    if (height, width) != (size, size):
        short = min(height, width)
        tall, wide = height * size // short, width * size // short
        x = jax.image.resize(x, (batch, tall, wide, 3), "cubic", antialias=True)
        top, left = round((tall - size) / 2), round((wide - size) / 2)
        x = jnp.clip(x[:, top : top + size, left : left + size], 0.0, 1.0)
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (cfg.pixel_mean, cfg.pixel_std))
    return (x - mean) / std


def encode_image(cfg: ClipConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """A vector for each picture.

    images_BHWC: float in [0, 1], any size (`preprocess`). Returns float32 (B, E) of length 1.
    """
    x, p, grid = preprocess(cfg, images_BHWC), cfg.patch_size, cfg.image_size // cfg.patch_size
    tower, batch = params["vision"], len(images_BHWC)
    # A convolution whose windows do not overlap, as one product.
    x = x.reshape(batch, grid, p, grid, p, 3).swapaxes(2, 3).reshape(batch, grid * grid, p * p * 3)
    kernel = tower["patch"]["kernel"].reshape(p * p * 3, cfg.vision.dim)
    x_BND = jnp.einsum("bnc,cd->bnd", x.astype(cfg.dtype), kernel.astype(cfg.dtype))
    first = jnp.broadcast_to(tower["class_embed"].astype(cfg.dtype), (batch, 1, cfg.vision.dim))
    x_BTD = jnp.concatenate([first, x_BND], axis=1).astype(jnp.float32) + tower["pos"][None]
    x_BTD = _norm(tower["norm_in"], constrain(x_BTD, "batch", None, "embed")).astype(cfg.dtype)
    sees = np.ones((x_BTD.shape[1],) * 2, bool)
    x_BTD = _run(cfg, cfg.vision, tower["blocks"], x_BTD, sees)
    return _project(tower, x_BTD[:, 0])


def encode_text(cfg: ClipConfig, params: Params, text_BT: jax.Array) -> jax.Array:
    """A vector for each caption.

    text_BT: int32 (B, T) in [0, text_vocab): start token, pieces, end token, and after it anything. Returns
    float32 (B, E) of length 1. Raises ValueError for another shape or dtype.
    """
    if text_BT.ndim != 2 or text_BT.shape[1] != cfg.text_len:
        raise ValueError(f"text has shape {text_BT.shape}, want (batch, {cfg.text_len}); pad or cut captions")
    if not jnp.issubdtype(text_BT.dtype, jnp.integer):
        raise ValueError(f"text is {text_BT.dtype}, want int32 ids")
    tower = params["text"]
    x_BTD = tower["embed"][text_BT] + tower["pos"][None]
    x_BTD = constrain(x_BTD, "batch", None, "embed").astype(cfg.dtype)
    x_BTD = _run(cfg, cfg.text, tower["blocks"], x_BTD, np.tri(cfg.text_len, dtype=bool))
    end_B = jnp.argmax(text_BT == cfg.eos_id, axis=1)  # the first one
    x_BD = jnp.take_along_axis(x_BTD, end_B[:, None, None], axis=1)[:, 0]
    return _project(tower, x_BD)


def _run(cfg: ClipConfig, tower: TowerConfig, blocks: Params, x_BTD: jax.Array, mask_TT) -> jax.Array:
    block, mask_TT = _block(cfg, tower), jnp.asarray(mask_TT)

    def layer(x_BTD, layer_params):
        return block.apply({"params": layer_params}, x_BTD, mask_TT)[0]

    if cfg.remat == "full":
        layer = jax.checkpoint(layer)
    unroll = min(cfg.scan_unroll, tower.layers)
    return jax.lax.scan(lambda x, p: (layer(x, p), None), x_BTD, blocks, unroll=unroll)[0]


def _norm(params: Params, x: jax.Array) -> jax.Array:
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32).apply({"params": params}, x)


def _project(tower: Params, x_BD: jax.Array) -> jax.Array:
    """The last norm, the projection and length 1, in float32."""
    x_BD = _norm(tower["norm_out"], x_BD)
    x_BE = jnp.einsum("bd,de->be", x_BD, tower["proj"]["kernel"], precision="highest")
    return x_BE / jnp.sqrt(jnp.sum(jnp.square(x_BE), axis=-1, keepdims=True) + 1e-12)


# --- the loss --------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _at_most(x: jax.Array, most: float) -> jax.Array:
    """`min(x, most)`; above, the gradient passes only where descent brings `x` back down."""
    return jnp.minimum(x, most)


def _at_most_fwd(x, most):
    return jnp.minimum(x, most), x


def _at_most_bwd(most, x, grad):
    return (jnp.where((x < most) | (grad > 0), grad, 0.0),)


_at_most.defvjp(_at_most_fwd, _at_most_bwd)


def logit_scale(cfg: ClipConfig, params: Params) -> jax.Array:
    """The learned factor of the cosines, float32 scalar in (0, cfg.logit_scale_max]."""
    return jnp.exp(_at_most(params["logit_scale"], math.log(cfg.logit_scale_max)))


def loss(
    cfg: ClipConfig, params: Params, images_BHWC: jax.Array, text_BT: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of finding the caption of each picture among those of the batch, and the picture of each
    caption, in nats, the mean of both (2103.00020, figure 3). Two rows or more; without training it is log B.

    Under a mesh the other rows are those of all devices. Returns float32 scalar and metrics `scale`,
    `image_to_text` and `text_to_image`, the shares of rows found first. Raises ValueError for rows that do
    not match or that `cfg.grad_cache_chunks` does not divide.
    """
    if len(images_BHWC) != len(text_BT):
        raise ValueError(f"{len(images_BHWC)} pictures and {len(text_BT)} captions; want one caption each")
    image_BE = _in_chunks(cfg, partial(encode_image, cfg, params), images_BHWC)
    text_BE = _in_chunks(cfg, partial(encode_text, cfg, params), text_BT)
    scale = logit_scale(cfg, params)
    value, metrics = contrastive_loss(scale, image_BE, text_BE)
    return value, {"scale": scale, **metrics}


def contrastive_loss(
    scale: jax.Array, image_BE: jax.Array, text_BE: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`loss` of vectors of length 1, float32 (B, E), and the factor of their cosines."""
    cosine_BB = jnp.einsum("ae,be->ab", image_BE, text_BE, precision="highest")
    logits_BB = constrain(scale * cosine_BB, "batch", None)
    right_B, rows_B = jnp.diagonal(logits_BB), jnp.arange(len(logits_BB))
    image_to_text, text_to_image = (
        jnp.mean(jax.nn.logsumexp(logits_BB, axis=axis) - right_B) for axis in (1, 0)
    )
    found = [jnp.mean(jnp.argmax(logits_BB, axis=axis) == rows_B) for axis in (1, 0)]
    metrics = dict(zip(("image_to_text", "text_to_image"), found, strict=True))
    return (image_to_text + text_to_image) / 2, metrics


def _in_chunks(cfg: ClipConfig, encode, x_B: jax.Array) -> jax.Array:
    """`encode` over `cfg.grad_cache_chunks` parts of the rows, one by one, computed again in the backward pass: the memory of
    one part, and the loss and gradient of all rows at once (Gao et al. 2021, 2101.06983)."""
    n, rows = cfg.grad_cache_chunks, len(x_B)
    if n == 1:
        return encode(x_B)
    if rows % n:
        raise ValueError(f"{rows} rows are not divisible by model.grad_cache_chunks {n}; change one of them")
    # Part i has the rows i, i + n, ...: under a mesh each device finds its share among its own rows.
    x_NB = x_B.reshape(rows // n, n, *x_B.shape[1:]).swapaxes(0, 1)
    x_NB = constrain(x_NB, None, "batch", *(None,) * (x_B.ndim - 1))
    y_NBE = jax.lax.map(jax.checkpoint(encode), x_NB)
    return y_NBE.swapaxes(0, 1).reshape(rows, cfg.embed_dim)


# --- re-ranking ------------------------------------------------------------------------------------------


def similarity(cfg: ClipConfig, params: Params, images_BHWC: jax.Array, text_BT: jax.Array) -> jax.Array:
    """How well each picture fits its caption: the cosine of their vectors, float32 (B,) in [-1, 1].

    images_BHWC: float in [0, 1], any size. text_BT: int32 (B, T), the caption of each picture.
    """
    if len(images_BHWC) != len(text_BT):
        raise ValueError(f"{len(images_BHWC)} pictures and {len(text_BT)} captions; want one caption each")
    image_BE, text_BE = encode_image(cfg, params, images_BHWC), encode_text(cfg, params, text_BT)
    return jnp.einsum("be,be->b", image_BE, text_BE, precision="highest")


def rerank(
    cfg: ClipConfig, params: Params, images_CNHWC: jax.Array, text_CT: jax.Array, keep: int
) -> tuple[jax.Array, jax.Array]:
    """The `keep` pictures of each caption that fit it best, best first (2102.12092, 2.6).

    images_CNHWC: float in [0, 1], N candidates for each caption. text_CT: int32 (C, T). Returns int32 (C, K)
    indices of candidates and float32 (C, K) their scores; of equal ones the first. Raises ValueError unless
    1 <= keep <= N.
    """
    captions, candidates = images_CNHWC.shape[:2]
    if captions != len(text_CT):
        raise ValueError(f"pictures for {captions} captions and {len(text_CT)} captions; want one set each")
    if not 1 <= keep <= candidates:
        raise ValueError(f"keep is {keep}; want 1 to {candidates}, the candidates of a caption")
    image_BE = encode_image(cfg, params, images_CNHWC.reshape(-1, *images_CNHWC.shape[2:]))
    image_CNE = image_BE.reshape(captions, candidates, -1)
    text_CE = encode_text(cfg, params, text_CT)
    score_CN = jnp.einsum("cne,ce->cn", image_CNE, text_CE, precision="highest")
    best, which = jax.lax.top_k(score_CN, keep)
    return which.astype(jnp.int32), best
