"""VQGAN (Esser et al. 2020, 2012.09841): images to a grid of codes and back by convolutions and attention.

The architecture is the published one, so published weights can be imported: group norm with epsilon 1e-6, swish,
attention with one head, downsampling padded on the right and at the bottom only. The quantizer is configurable
(quantizers.py). B batch, H W image, h w code grid, N = h*w codes in raster order, V codebook, C channels, S positions,
D width of a code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import VQGANConfig
from dalle_jax.models.tokenizer_losses import check_codes, check_images
from dalle_jax.models.vqgan import quantizers
from dalle_jax.nn.conv import Conv
from dalle_jax.nn.module import apply_module
from dalle_jax.nn.norm import GroupNorm
from dalle_jax.nn.products import einsum
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


def _conv(width: int, size: int, dtype: Any, name: str, *, strides: int = 1, padding: Any = None) -> Conv:
    return Conv(width, size, strides, padding, dtype, name=name)


class ResBlock(nn.Module):
    """Two convolutions with group norm and a shortcut."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC):
        y = _conv(self.width, 3, self.dtype, "conv1")(nn.swish(GroupNorm(name="norm1")(x_BHWC)))
        y = _conv(self.width, 3, self.dtype, "conv2")(nn.swish(GroupNorm(name="norm2")(y)))
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = _conv(self.width, 1, self.dtype, "nin_shortcut")(x_BHWC)
        return x_BHWC + y


class AttnBlock(nn.Module):
    """Full attention over positions, one head as wide as the channels."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC):
        b, h, w, c = x_BHWC.shape
        y = GroupNorm(name="norm")(x_BHWC)
        q, k, v = (_conv(c, 1, self.dtype, name)(y).reshape(b, h * w, c) for name in "qkv")
        att_BSS = einsum("bqc,bkc->bqk", q, k, out_dtype=jnp.float32) / math.sqrt(c)
        y = einsum("bqk,bkc->bqc", jax.nn.softmax(att_BSS).astype(v.dtype), v).reshape(b, h, w, c)
        return x_BHWC + _conv(c, 1, self.dtype, "proj_out")(y)


class MidBlock(nn.Module):
    """The blocks at the lowest resolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = ResBlock(width, self.dtype, name="block_1")(x)
        x = AttnBlock(self.dtype, name="attn_1")(x)
        return ResBlock(width, self.dtype, name="block_2")(x)


class VQGANEncoder(nn.Module):
    """Images to latents."""

    cfg: VQGANConfig

    @nn.compact
    def __call__(self, x_BHWC):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x = _conv(cfg.width, 3, dtype, "conv_in")(x_BHWC)
        for level, multiplier in enumerate(cfg.channel_multipliers):
            for j in range(cfg.blocks):
                x = ResBlock(cfg.width * multiplier, dtype, name=f"down_{level}_block_{j}")(x)
                if level in cfg.attention_levels:
                    x = AttnBlock(dtype, name=f"down_{level}_attn_{j}")(x)
            if level + 1 < len(cfg.channel_multipliers):
                padding = ((0, 1), (0, 1))
                down = _conv(x.shape[-1], 3, dtype, f"down_{level}_downsample", strides=2, padding=padding)
                x = down(x)
        x = MidBlock(dtype, name="mid")(x)
        return _conv(cfg.latent_width, 3, jnp.float32, "conv_out")(nn.swish(GroupNorm(name="norm_out")(x)))


class VQGANDecoder(nn.Module):
    """Quantized latents to images."""

    cfg: VQGANConfig

    @nn.compact
    def __call__(self, z_BhwC):
        """Return pixels in `cfg.pixel_range`, and the input of the last convolution."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x = _conv(cfg.width * cfg.channel_multipliers[-1], 3, dtype, "conv_in")(z_BhwC)
        x = MidBlock(dtype, name="mid")(x)
        for level in reversed(range(len(cfg.channel_multipliers))):
            for j in range(cfg.blocks + 1):
                x = ResBlock(cfg.width * cfg.channel_multipliers[level], dtype, name=f"up_{level}_block_{j}")(
                    x
                )
                if level in cfg.attention_levels:
                    x = AttnBlock(dtype, name=f"up_{level}_attn_{j}")(x)
            if level > 0:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(x.shape[-1], 3, dtype, f"up_{level}_upsample")(x)
        features = nn.swish(GroupNorm(name="norm_out")(x))
        return _conv(3, 3, jnp.float32, "conv_out")(features), features


class Reconstruction(NamedTuple):
    """The training pass of a batch.

    Attributes:
      pixels: float32 (B, H, W, 3) in `cfg.pixel_range`, not clipped.
      features: (B, H, W, C), the input of the decoder's last convolution.
      latents: float32 (B, h, w, D), the input of the quantizer.
      codes: int32 (B, h, w).
      loss: float32 scalar, of the quantizer.
    """

    pixels: jax.Array
    features: jax.Array
    latents: jax.Array
    codes: jax.Array
    loss: jax.Array


def init(cfg: VQGANConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32: `encoder`, `quant_conv`, `quantize`, `post_quant_conv` and `decoder`."""
    k_encoder, k_decoder, k_before, k_after, k_quantize = jax.random.split(key, 5)
    image = jnp.zeros((1, cfg.image_size, cfg.image_size, 3))
    z = jnp.zeros((1, cfg.grid, cfg.grid, cfg.latent_width))
    q = jnp.zeros((1, cfg.grid, cfg.grid, cfg.quantizer.dim))
    params = {
        "encoder": VQGANEncoder(cfg).init(k_encoder, image)["params"],
        "quant_conv": _quant_conv(cfg).init(k_before, z)["params"],
        "quantize": quantizers.init(cfg.quantizer, k_quantize),
        "post_quant_conv": _post_quant_conv(cfg).init(k_after, q)["params"],
        "decoder": VQGANDecoder(cfg).init(k_decoder, z)["params"],
    }
    return {name: part for name, part in params.items() if part}


def _quant_conv(cfg: VQGANConfig) -> nn.Conv:
    return nn.Conv(cfg.quantizer.dim, (1, 1))


def _post_quant_conv(cfg: VQGANConfig) -> nn.Conv:
    return nn.Conv(cfg.latent_width, (1, 1))


def to_pixel_range(cfg: VQGANConfig, images_BHWC: jax.Array) -> jax.Array:
    """Map pixels from [0, 1] to `cfg.pixel_range`."""
    return images_BHWC if cfg.pixel_range == "unit" else 2 * images_BHWC - 1


def from_pixel_range(cfg: VQGANConfig, pixels_BHWC: jax.Array) -> jax.Array:
    """Invert `to_pixel_range` and clip to [0, 1]."""
    return jnp.clip(pixels_BHWC if cfg.pixel_range == "unit" else (pixels_BHWC + 1) / 2, 0.0, 1.0)


def encode_latents(cfg: VQGANConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Compute the input of the quantizer, float32 (B, h, w, D), from float images in [0, 1]."""
    x = to_pixel_range(cfg, images_BHWC.astype(jnp.float32))
    z = apply_module(VQGANEncoder(cfg), params["encoder"], x)
    return constrain(apply_module(_quant_conv(cfg), params["quant_conv"], z), "batch", None, None, None)


def _decode_latents(cfg: VQGANConfig, params: Params, z_BhwD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return pixels in `cfg.pixel_range`, and the input of the last convolution."""
    z = apply_module(_post_quant_conv(cfg), params["post_quant_conv"], z_BhwD)
    return apply_module(VQGANDecoder(cfg), params["decoder"], z)


def encode(cfg: VQGANConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Encode images as their nearest codes; arguments as in `tokenizer.encode`."""
    check_images(cfg, images_BHWC)
    z = encode_latents(cfg, params, images_BHWC)
    codes_Bhw = quantizers.nearest_codes(cfg.quantizer, params.get("quantize", {}), z)
    return codes_Bhw.reshape(len(codes_Bhw), cfg.num_codes)


def decode(cfg: VQGANConfig, params: Params, codes_BN: jax.Array) -> jax.Array:
    """Decode codes to images; arguments as in `tokenizer.decode`."""
    check_codes(cfg, codes_BN)
    codes_Bhw = codes_BN.reshape(len(codes_BN), cfg.grid, cfg.grid)
    z = quantizers.embed_codebook(cfg.quantizer, params.get("quantize", {}), codes_Bhw)
    return from_pixel_range(cfg, _decode_latents(cfg, params, z)[0])


def reconstruct(
    cfg: VQGANConfig, params: Params, images_BHWC: jax.Array, key: jax.Array, tau: jax.Array | float = 1.0
) -> Reconstruction:
    """Encode, quantize and decode images for training, with gradients through the quantizer.

    Args:
      images_BHWC: float (B, image_size, image_size, 3) in [0, 1].
      key: of the Gumbel noise.
      tau: temperature of the Gumbel-softmax, > 0.

    Raises:
      ValueError: another shape or an integer dtype.
    """
    check_images(cfg, images_BHWC)
    z = encode_latents(cfg, params, images_BHWC)
    quantized = quantizers.quantize(cfg.quantizer, params.get("quantize", {}), z, key, tau)
    pixels, features = _decode_latents(cfg, params, quantized.z)
    return Reconstruction(pixels, features, z, quantized.codes, quantized.loss)
