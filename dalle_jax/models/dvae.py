"""The discrete VAE of DALL-E (Ramesh et al. 2021, 2102.12092, 2.1 and A): images to a grid of codes and back.

Training uses the Gumbel-softmax relaxation of the codes, the logit-Laplace likelihood of the pixels and a KL term to
the uniform prior. Encoder and decoder have the published architecture, so published weights can be imported. B batch, H
W image, h w code grid, N = h*w codes in raster order, V codebook, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import DVAEConfig
from dalle_jax.models import tokenizer_losses
from dalle_jax.nn.conv import Conv
from dalle_jax.nn.module import apply_module
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


def _conv(width: int, size: int, dtype: Any, name: str) -> Conv:
    """Make a convolution; weights normal with variance 1 / (inputs * kernel area), biases zero."""
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    return Conv(width, size, dtype=dtype, kernel_init=init, name=name)


class Residual(nn.Module):
    """A shortcut plus `gain` times four convolutions, each after a ReLU."""

    width: int
    kernels: tuple[int, ...]  # of the four convolutions
    gain: float  # 1 / layers**2
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC):
        shortcut = x_BHWC
        if x_BHWC.shape[-1] != self.width:
            shortcut = _conv(self.width, 1, self.dtype, "id_path")(x_BHWC)
        y = x_BHWC
        for i, kernel in enumerate(self.kernels, 1):
            width = self.width if i == len(self.kernels) else self.width // 4
            y = _conv(width, kernel, self.dtype, f"conv_{i}")(nn.relu(y))
        return shortcut + self.gain * y


class Stack(nn.Module):
    """Groups of residual blocks, with the function `between` applied between groups."""

    widths: tuple[int, ...]  # one per group
    blocks: int
    kernels: tuple[int, ...]
    between: Callable[[jax.Array], jax.Array]
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


def _max_pool(x_BHWC: jax.Array) -> jax.Array:
    """Apply 2x2 max-pooling as three selections, whose backward pass is many times faster on CPU than reduce-window's.

    The gradient of `jnp.max` divides by the number of entries equal to the maximum, which is 0 / 0 where XLA recomputes
    them with another rounding. A selection picks one entry with any rounding.
    """
    upper = _larger(x_BHWC[:, ::2, ::2], x_BHWC[:, ::2, 1::2])
    return _larger(upper, _larger(x_BHWC[:, 1::2, ::2], x_BHWC[:, 1::2, 1::2]))


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(x < y, y, x)


def _double(x_BHWC: jax.Array) -> jax.Array:
    """Upsample by 2, nearest neighbor."""
    b, h, w, c = x_BHWC.shape
    return jnp.broadcast_to(x_BHWC[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class DVAEEncoder(nn.Module):
    """Images to logits over the codebook."""

    cfg: DVAEConfig

    @nn.compact
    def __call__(self, x_BHWC):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        widths = tuple(cfg.width * 2**g for g in range(cfg.groups))
        x = _conv(cfg.width, 7, dtype, "input")(x_BHWC)
        x = Stack(widths, cfg.blocks, (3, 3, 3, 1), _max_pool, dtype, name="groups")(x)
        return _conv(cfg.vocab, 1, jnp.float32, "output")(nn.relu(x))


class DVAEDecoder(nn.Module):
    """Codes to the location and log-scale of every pixel value."""

    cfg: DVAEConfig

    @nn.compact
    def __call__(self, z_BhwV):
        """Decode float weights over the codebook, (B, h, w, V), or int32 codes, (B, h, w)."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        widths = tuple(cfg.width * 2**g for g in reversed(range(cfg.groups)))
        x = CodeEmbed(cfg.vocab, cfg.decoder_width, name="input")(z_BhwV)
        x = Stack(widths, cfg.blocks, (1, 3, 3, 3), _double, dtype, name="groups")(x.astype(dtype))
        return _conv(6, 1, jnp.float32, "output")(nn.relu(x))


class CodeEmbed(nn.Module):
    """A 1x1 convolution from weights over the codebook; a table lookup for codes."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self, z):
        # Not by fan-in, as in other convolutions: only one row is used, whatever the vocabulary.
        init = nn.initializers.normal(2.0 / math.sqrt(self.width))
        kernel = self.param("kernel", init, (1, 1, self.vocab, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        table_VC = (
            kernel[0, 0] + bias[None]
        )  # the weights over the codebook sum to 1, so the bias can be added here
        return table_VC[z] if jnp.issubdtype(z.dtype, jnp.integer) else z @ table_VC


def init(cfg: DVAEConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32: `encoder` and `decoder`."""
    k_encoder, k_decoder = jax.random.split(key)
    image = jnp.zeros((1, cfg.image_size, cfg.image_size, 3))
    codes = jnp.zeros((1, cfg.grid, cfg.grid), jnp.int32)
    return {
        "encoder": DVAEEncoder(cfg).init(k_encoder, image)["params"],
        "decoder": DVAEDecoder(cfg).init(k_decoder, codes)["params"],
    }


def encode_logits(cfg: DVAEConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Compute the logits of every code at every grid position.

    Args:
      images_BHWC: float (B, image_size, image_size, 3) in [0, 1].

    Returns:
      float32 (B, h, w, V).

    Raises:
      ValueError: another shape or an integer dtype.
    """
    tokenizer_losses.check_images(cfg, images_BHWC)
    x = tokenizer_losses.map_pixels(images_BHWC.astype(jnp.float32))
    logits = apply_module(DVAEEncoder(cfg), params["encoder"], x)
    return constrain(logits, "batch", None, None, "vocab")


def encode(cfg: DVAEConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Encode images as their most probable codes (2102.12092, 2.2); arguments as in `tokenizer.encode`."""
    logits = encode_logits(cfg, params, images_BHWC)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(len(logits), cfg.num_codes)


def _pixels(stats_BHWC: jax.Array) -> jax.Array:
    """Compute sigmoid(mu), unmapped: the mode of the decoder's distribution without the Jacobian (A.3)."""
    return tokenizer_losses.unmap_pixels(jax.nn.sigmoid(stats_BHWC[..., :3]))


def decode(cfg: DVAEConfig, params: Params, codes_BN: jax.Array) -> jax.Array:
    """Decode codes to images; arguments as in `tokenizer.decode`.

    Codes outside the codebook are not detected, as the array may be traced; check them on the host.
    """
    tokenizer_losses.check_codes(cfg, codes_BN)
    codes = codes_BN.reshape(len(codes_BN), cfg.grid, cfg.grid)
    return _pixels(apply_module(DVAEDecoder(cfg), params["decoder"], codes))


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
    """Compute the negative evidence lower bound per pixel value, in nats.

    Gumbel noise and temperature apply in the forward and the backward pass, without straight-through. The KL term is
    between softmax(logits) and the uniform distribution. Both terms are sums over an image divided by its H*W*3 values
    (2102.12092, A.2).

    Args:
      images_BHWC: float (B, image_size, image_size, 3) in [0, 1].
      key: of the Gumbel noise.
      tau: temperature, > 0.
      kl_weight: beta of the KL term.
      code_usage_weight: of `tokenizer_losses.codebook_imbalance`, not part of the bound; 0 in the paper.

    Returns:
      float32 scalar, and the metrics `reconstruction` (nats per value), `kl` (nats per code), `psnr` (dB, of the
      relaxed reconstruction), `codebook_use` (fraction of the codebook in the batch's argmax codes) and `perplexity`.
    """
    logits = encode_logits(cfg, params, images_BHWC)
    gumbel = jax.random.gumbel(key, logits.shape)
    soft_BhwV = jax.nn.softmax((logits + gumbel) / tau)
    stats = apply_module(DVAEDecoder(cfg), params["decoder"], soft_BhwV)
    target = tokenizer_losses.map_pixels(images_BHWC.astype(jnp.float32))
    log_b = stats[..., 3:]
    if cfg.min_scale > 0:
        # b + min_scale: a lower bound with a gradient everywhere
        log_b = jnp.logaddexp(log_b, math.log(cfg.min_scale))
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
