"""Discrete VAE of DALL-E (Ramesh et al. 2021, 2102.12092, 2.1 and A): pictures to a grid of codes and back.

Trained by the Gumbel-softmax relaxation of the codes, the logit-Laplace likelihood of the pixels and a KL
term to the uniform prior. Encoder and decoder have the published architecture block by block, so published
weights fit. B batch, H W image, h w code grid, N = h*w codes in raster order, V codebook, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import DVAEConfig
from dalle_jax.models import tokenizer_losses
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


class Conv(nn.Module):
    """Same-padded convolution; weights normal with variance 1 / (inputs * kernel area), biases zero.

    Two cases are written so that XLA runs them well on CPU too, with the same result: a 1x1 kernel is a
    matrix product, and few input channels are first gathered along the rows of the kernel.
    """

    width: int
    kernel: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC):
        size, channels = self.kernel, x_BHWC.shape[-1]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (size, size, channels, self.width)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        x_BHWC = x_BHWC.astype(self.dtype)
        if size == 1:
            return x_BHWC @ kernel[0, 0] + bias[None, None, None]
        if channels <= 4:
            width, half = x_BHWC.shape[2], size // 2
            x_BHWC = jnp.pad(x_BHWC, ((0, 0), (0, 0), (half, half), (0, 0)))
            x_BHWC = jnp.concatenate([x_BHWC[:, :, i : i + width] for i in range(size)], axis=-1)
            kernel = kernel.reshape(size, 1, size * channels, self.width)
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y_BHWC + bias[None, None, None]


class Residual(nn.Module):
    """Shortcut plus 1/layers**2 times four convolutions, each after a ReLU."""

    width: int
    kernels: tuple[int, ...]  # of the four convolutions
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC):
        shortcut = x_BHWC
        if x_BHWC.shape[-1] != self.width:
            shortcut = Conv(self.width, 1, self.dtype, name="id_path")(x_BHWC)
        y = x_BHWC
        for i, kernel in enumerate(self.kernels, 1):
            width = self.width if i == len(self.kernels) else self.width // 4
            y = Conv(width, kernel, self.dtype, name=f"conv_{i}")(nn.relu(y))
        return shortcut + self.gain * y


class Stack(nn.Module):
    """Groups of residual blocks, with `between` applied from one group to the next."""

    widths: tuple[int, ...]  # one per group
    blocks: int
    kernels: tuple[int, ...]
    between: Any
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC):
        gain = 1.0 / (len(self.widths) * self.blocks) ** 2
        for g, width in enumerate(self.widths, 1):
            for b in range(1, self.blocks + 1):
                x_BHWC = Residual(width, self.kernels, gain, self.dtype, name=f"group_{g}_block_{b}")(x_BHWC)
            if g < len(self.widths):
                x_BHWC = self.between(x_BHWC)
        return x_BHWC


def _halve(x_BHWC):
    """2x2 max-pool as three selections: on CPU many times faster backward than reduce-window.

    The gradient of `max` divides by the number of places that equal it; that is 0 / 0 where XLA computes them
    again with another rounding. A selection has one winner whatever the rounding.
    """
    top = _larger(x_BHWC[:, ::2, ::2], x_BHWC[:, ::2, 1::2])
    return _larger(top, _larger(x_BHWC[:, 1::2, ::2], x_BHWC[:, 1::2, 1::2]))


def _larger(x, y):
    return jnp.where(x < y, y, x)


def _double(x_BHWC):
    """Nearest-neighbour upsampling by 2."""
    b, h, w, c = x_BHWC.shape
    return jnp.broadcast_to(x_BHWC[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class DVAEEncoder(nn.Module):
    cfg: DVAEConfig

    @nn.compact
    def __call__(self, x_BHWC):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        widths = tuple(cfg.width * 2**g for g in range(cfg.groups))
        x = Conv(cfg.width, 7, dtype, name="input")(x_BHWC)
        x = Stack(widths, cfg.blocks, (3, 3, 3, 1), _halve, dtype, name="groups")(x)
        return Conv(cfg.vocab, 1, jnp.float32, name="output")(nn.relu(x))


class DVAEDecoder(nn.Module):
    cfg: DVAEConfig

    @nn.compact
    def __call__(self, z_BhwV):
        """`z_BhwV` float weights over the codebook, or int32 codes (B, h, w), which look rows up instead."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        widths = tuple(cfg.width * 2**g for g in reversed(range(cfg.groups)))
        x = CodeEmbed(cfg.vocab, cfg.decoder_width, name="input")(z_BhwV)
        x = Stack(widths, cfg.blocks, (1, 3, 3, 3), _double, dtype, name="groups")(x.astype(dtype))
        return Conv(6, 1, jnp.float32, name="output")(nn.relu(x))


class CodeEmbed(nn.Module):
    """1x1 convolution from the codebook; on codes it is a table lookup."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self, z):
        # By fan-in, as other convolutions, rows would shrink with the vocabulary: only one of them is used.
        init = nn.initializers.normal(2.0 / math.sqrt(self.width))
        kernel = self.param("kernel", init, (1, 1, self.vocab, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        table_VC = kernel[0, 0] + bias[None]  # weights over the codebook sum to one, so the bias may move in
        return table_VC[z] if jnp.issubdtype(z.dtype, jnp.integer) else z @ table_VC


def init(cfg: DVAEConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters `{"encoder": ..., "decoder": ...}`."""
    k_encoder, k_decoder = jax.random.split(key)
    image = jnp.zeros((1, cfg.image_size, cfg.image_size, 3))
    codes = jnp.zeros((1, cfg.grid, cfg.grid), jnp.int32)
    return {
        "encoder": DVAEEncoder(cfg).init(k_encoder, image)["params"],
        "decoder": DVAEDecoder(cfg).init(k_decoder, codes)["params"],
    }


def encode_logits(cfg: DVAEConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Scores of every code at every place.

    images_BHWC: float in [0, 1], (B, image_size, image_size, 3). Returns float32 (B, h, w, V).
    Raises ValueError for another shape or an integer dtype.
    """
    tokenizer_losses.check_images(cfg, images_BHWC)
    x = tokenizer_losses.map_pixels(images_BHWC.astype(jnp.float32))
    logits = DVAEEncoder(cfg).apply({"params": params["encoder"]}, x)
    return constrain(logits, "batch", None, None, "vocab")


def encode(cfg: DVAEConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """The most probable code at every place, without noise (2102.12092, 2.2).

    images_BHWC: float in [0, 1], (B, image_size, image_size, 3). Returns int32 (B, N), raster order.
    """
    logits = encode_logits(cfg, params, images_BHWC)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(len(logits), cfg.num_codes)


def _pixels(stats_BHWC: jax.Array) -> jax.Array:
    """The mode of the decoder's distribution without the Jacobian: sigmoid(mu), unmapped (A.3)."""
    return tokenizer_losses.unmap_pixels(jax.nn.sigmoid(stats_BHWC[..., :3]))


def decode(cfg: DVAEConfig, params: Params, codes_BN: jax.Array) -> jax.Array:
    """The picture of each row of codes.

    codes_BN: int32 in [0, V), (B, N). Returns float32 (B, image_size, image_size, 3) in [0, 1].
    Raises ValueError if N is not cfg.num_codes or codes are not integers. Codes outside the codebook can't
    be seen in a traced array; check them on the host.
    """
    tokenizer_losses.check_codes(cfg, codes_BN)
    codes = codes_BN.reshape(len(codes_BN), cfg.grid, cfg.grid)
    return _pixels(DVAEDecoder(cfg).apply({"params": params["decoder"]}, codes))


def loss(
    cfg: DVAEConfig,
    params: Params,
    images_BHWC: jax.Array,
    key: jax.Array,
    *,
    tau: jax.Array | float,
    kl_weight: jax.Array | float,
    code_usage_weight: jax.Array | float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative evidence lower bound per pixel value, in nats, and what it is made of.

    Gumbel noise and temperature are in the forward and the backward pass, without straight-through; the KL
    term is between softmax(logits) and the uniform distribution. Both terms are sums over a picture divided
    by its H*W*3 values (2102.12092, A.2).

    images_BHWC: float in [0, 1]. tau: temperature above 0. kl_weight: beta of the KL term. code_usage_weight: of
    `losses.codebook_imbalance`, which is no part of the bound; 0 in the paper.
    Returns float32 scalar and metrics `reconstruction` (nats per value), `kl` (nats per code), `psnr` (dB, of
    the relaxed reconstruction), `codebook_use` (share, of the batch's argmax codes), `perplexity`.
    """
    logits = encode_logits(cfg, params, images_BHWC)
    gumbel = jax.random.gumbel(key, logits.shape)
    soft_BhwV = jax.nn.softmax((logits + gumbel) / tau)
    stats = DVAEDecoder(cfg).apply({"params": params["decoder"]}, soft_BhwV)
    target = tokenizer_losses.map_pixels(images_BHWC.astype(jnp.float32))
    log_b = stats[..., 3:]
    if cfg.min_scale > 0:
        log_b = jnp.logaddexp(
            log_b, math.log(cfg.min_scale)
        )  # b + min_scale: a floor that keeps its gradient
    reconstruction = jnp.mean(tokenizer_losses.logit_laplace_nll(target, stats[..., :3], log_b))
    kl = jnp.mean(tokenizer_losses.kl_to_uniform(logits))
    total = reconstruction + kl_weight * kl * cfg.num_codes / math.prod(images_BHWC.shape[1:])
    total += code_usage_weight * tokenizer_losses.codebook_imbalance(logits)
    use, perplexity = tokenizer_losses.codebook_use(jnp.argmax(logits, axis=-1), cfg.vocab)
    metrics = {
        "reconstruction": reconstruction,
        "kl": kl,
        "psnr": jnp.mean(tokenizer_losses.psnr(images_BHWC, _pixels(stats))),
        "codebook_use": use,
        "perplexity": perplexity,
    }
    return total, metrics
