"""Losses, metrics and input checks of image tokenizers. B batch, H W image, C channels, N codes, V codebook."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dalle_jax.config import Schedule, TokenizerConfig

LAPLACE_EPS = 0.1  # margin of the pixel map at either end; 2102.12092, A.3


def schedule_value(schedule: Schedule, step: jax.Array) -> jax.Array:
    """Compute the value of a half-cosine schedule after `step` training steps, float32."""
    if schedule.steps == 0:
        return jnp.float32(schedule.end)
    fraction = jnp.clip(step.astype(jnp.float32) / schedule.steps, 0.0, 1.0)
    return schedule.end + (schedule.start - schedule.end) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))


def check_images(cfg: TokenizerConfig, images: jax.Array) -> None:
    """Raise ValueError unless `images` are floats of shape (B, image_size, image_size, 3)."""
    size = cfg.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"Expected images of shape (batch, {size}, {size}, 3), got {images.shape}. Resize them."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"Expected float images in [0, 1], got {images.dtype}. Divide uint8 by 255.")


def check_codes(cfg: TokenizerConfig, codes_BN: jax.Array) -> None:
    """Raise ValueError unless `codes_BN` are integers of shape (B, num_codes)."""
    if codes_BN.ndim != 2 or codes_BN.shape[1] != cfg.num_codes:
        raise ValueError(f"Expected codes of shape (batch, {cfg.num_codes}), got {codes_BN.shape}.")
    if not jnp.issubdtype(codes_BN.dtype, jnp.integer):
        raise ValueError(f"Expected int32 codes in [0, {cfg.vocab}), got {codes_BN.dtype}.")


def map_pixels(x: jax.Array) -> jax.Array:
    """Map pixels from [0, 1] to [0.1, 0.9], where the logit of the logit-Laplace density is finite (A.3)."""
    return (1 - 2 * LAPLACE_EPS) * x + LAPLACE_EPS


def unmap_pixels(x: jax.Array) -> jax.Array:
    """Invert `map_pixels` and clip to [0, 1]."""
    return jnp.clip((x - LAPLACE_EPS) / (1 - 2 * LAPLACE_EPS), 0.0, 1.0)


def logit_laplace_nll(x: jax.Array, mu: jax.Array, log_b: jax.Array) -> jax.Array:
    """Compute the negative log-density of `x` in (0, 1) under the logit-Laplace distribution, elementwise, in nats.

    f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)); 2102.12092, A.3. All arguments of one shape.
    """
    logit = jnp.log(x) - jnp.log1p(-x)
    return math.log(2.0) + log_b + jnp.log(x * (1 - x)) + jnp.abs(logit - mu) * jnp.exp(-log_b)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """Compute the KL divergence of softmax(logits) from the uniform distribution, over the last axis, in nats."""
    log_p = jax.nn.log_softmax(logits)
    return math.log(logits.shape[-1]) + jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def psnr(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Compute the peak signal-to-noise ratio of each image, for values in [0, 1]: float32 (B,), dB."""
    mse_B = jnp.mean(jnp.square(x_BHWC - y_BHWC), axis=(1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(mse_B, 1e-10))


def codebook_use(codes: jax.Array, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Compute the fraction of the codebook in `codes`, and the perplexity of their distribution (1 to vocab)."""
    counts_V = jnp.zeros(vocab, jnp.float32).at[codes.reshape(-1)].add(1.0)
    p_V = counts_V / codes.size
    entropy = -jnp.sum(p_V * jnp.log(jnp.maximum(p_V, 1e-20)))
    return jnp.mean(counts_V > 0), jnp.exp(entropy)


def codebook_imbalance(logits: jax.Array) -> jax.Array:
    """Compute the KL divergence of the batch's mean code distribution from the uniform one, in nats; 0 is balanced.

    The mean is of softmax(logits) over all axes but the last. The result is low when the codes of a batch differ from
    each other, at any entropy of each.
    """
    p_V = jnp.mean(jax.nn.softmax(logits), axis=tuple(range(logits.ndim - 1)))
    return math.log(logits.shape[-1]) + jnp.sum(p_V * jnp.log(jnp.maximum(p_V, 1e-20)))


def laplacian_pyramid_loss(x_BHWC: jax.Array, y_BHWC: jax.Array, bands: int = 3) -> jax.Array:
    """Compute the mean absolute difference of each pair, averaged over the bands of a Laplacian pyramid, float32 (B,).

    A perceptual distance without weights: every band counts as much as flat color (as in Bojanowski et al. 2017,
    1707.05776).

    A band is the difference between an image and its 2x2 averages; the last band is the lowest resolution. There are
    fewer bands where a side is odd.
    """
    low, differences = x_BHWC - y_BHWC, []
    for _ in range(bands):
        b, h, w, c = low.shape
        if h % 2 or w % 2:
            break
        high, low = low, low.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        differences.append(high - jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2))
    differences.append(low)
    return jnp.mean(jnp.stack([jnp.mean(jnp.abs(d), axis=(1, 2, 3)) for d in differences]), axis=0)
