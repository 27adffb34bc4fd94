"""Adversarial training of VQGAN: a tokenizer and a discriminator (Esser et al. 2020, 2012.09841, 3.1).

    L = pixel_weight |x - x'| + perceptual_weight d(x, x') + quantizer loss + weight disc_factor lambda L_G
    lambda = |grad L_rec| / (|grad L_G| + 1e-4), gradients at the decoder's last convolution
    non-saturating: L_G = -E log D(x'), L_D = -E log D(x) - E log(1 - D(x'))       (Goodfellow et al. 2014)
    hinge:          L_G = -E s(x'),     L_D = (E max(0, 1 - s(x)) + E max(0, 1 + s(x'))) / 2

D = sigmoid(s). Both networks learn from one forward pass: the gradient of each term is taken at the image x', where the
terms are weighted, and passes through the tokenizer once.

A discriminator that starts late is random at first, and lambda makes its gradient as large as the reconstruction's. So
the decoder's term increases from 0 over `disc_warmup_steps` while the discriminator learns, and R1 (Mescheder et al.
2018, 1801.04406) bounds the discriminator's gradient at real images. B batch, H W image, h w code grid.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import AdversarialConfig, GumbelQuantizer, VQGANConfig
from dalle_jax.models import lpips as perceptual
from dalle_jax.models import tokenizer_losses
from dalle_jax.models.tokenizer_losses import laplacian_pyramid_loss
from dalle_jax.models.vqgan import autoencoder, discriminator
from dalle_jax.nn.module import apply_module
from dalle_jax.typing import Params

AdversarialLoss = Literal["non-saturating", "hinge"]


def init(cfg: VQGANConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32: `tokenizer`, and `discriminator` where `cfg.adversarial` is set."""
    k_tokenizer, k_discriminator = jax.random.split(key)
    params = {"tokenizer": autoencoder.init(cfg, k_tokenizer)}
    if cfg.adversarial is not None:
        params["discriminator"] = discriminator.init(cfg.adversarial, cfg.image_size, k_discriminator)
    return params


def generator_loss(kind: AdversarialLoss, fake: jax.Array) -> jax.Array:
    """Compute L_G from the logits of generated images; scalar."""
    if kind == "hinge":
        return -jnp.mean(fake)
    return -jnp.mean(jax.nn.log_sigmoid(fake))


def discriminator_loss(kind: AdversarialLoss, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Compute L_D from the logits of real and generated images; scalar."""
    if kind == "hinge":
        return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2
    return -jnp.mean(jax.nn.log_sigmoid(real)) - jnp.mean(jax.nn.log_sigmoid(-fake))


def r1_penalty(cfg: AdversarialConfig, params: Params, real_BHWC: jax.Array) -> jax.Array:
    """Compute half the mean squared gradient norm of an image's logit, the mean over its patches, at real images."""

    def mean_logit(x):
        return jnp.sum(jnp.mean(discriminator.patch_logits(cfg, params, x), axis=(1, 2)))

    return 0.5 * jnp.mean(jnp.sum(jnp.square(jax.grad(mean_logit)(real_BHWC)), axis=(1, 2, 3)))


def disc_factor(cfg: AdversarialConfig, step: jax.Array) -> jax.Array:
    """Compute the warm-up factor of the adversarial weight after `step` training steps, float32: 0 before
    `disc_start_step`, then linear to 1."""
    steps_since = (step - cfg.disc_start_step).astype(jnp.float32)
    return jnp.where(
        steps_since < 0, 0.0, jnp.clip((steps_since + 1) / max(cfg.disc_warmup_steps, 1), 0.0, 1.0)
    )


def adversarial_gradients(
    cfg: VQGANConfig,
    params: Params,
    lpips: Params | None,
    images_BHWC: jax.Array,
    key: jax.Array,
    step: jax.Array,
) -> tuple[Params, dict[str, jax.Array], dict[str, jax.Array]]:
    """Compute the gradients of both networks for one batch.

    Args:
      params: from `init`.
      lpips: from `lpips.load_lpips`, or None for the Laplacian pyramid.
      images_BHWC: float (B, image_size, image_size, 3) in [0, 1].
      key: of the quantizer.
      step: int32, training steps done.

    Returns:
      The gradients, of the structure of `params` (zeros for a discriminator that has not started).
      The metrics, float32 scalars: `loss` (the tokenizer's, without the adversarial term), `pixel`, `perceptual`,
      `quantizer`, `psnr`, `codebook_use`, `perplexity`; with a discriminator also `discriminator_loss`, `log_d_real`,
      `log_d_fake` (log D(x'), not log(1 - D)), `disc_factor`, `adaptive_weight`, and the norms of the two gradients
      at the last layer, `norm_reconstruction` and `norm_adversarial`, NaN before it starts.
      The inputs of `quantizers.restart_dead_codes`, `latents` and `codes`, (B, h, w, ...); {} where none restart.
    """
    tau = jnp.float32(1.0)
    if isinstance(cfg.quantizer, GumbelQuantizer):
        tau = tokenizer_losses.schedule_value(cfg.quantizer.tau, step)
    real = autoencoder.to_pixel_range(cfg, images_BHWC.astype(jnp.float32))

    def forward(tokenizer):
        out = autoencoder.reconstruct(cfg, tokenizer, images_BHWC, key, tau)
        return (out.pixels, out.loss), (out.features, out.latents, out.codes)

    def reconstruction_loss(pixels):
        pixel = jnp.mean(jnp.abs(real - pixels))
        distance = _perceptual_distance(cfg, lpips, real, pixels)
        return cfg.pixel_weight * pixel + cfg.perceptual_weight * distance, (pixel, distance)

    (pixels, quantizer_loss), backward, (features, latents, codes) = jax.vjp(
        forward, params["tokenizer"], has_aux=True
    )
    (value, (pixel, distance)), pixel_grad = jax.value_and_grad(reconstruction_loss, has_aux=True)(pixels)
    use, perplexity = tokenizer_losses.codebook_use(codes, cfg.vocab)
    metrics = {
        "loss": value + quantizer_loss,
        "pixel": pixel,
        "perceptual": distance,
        "quantizer": quantizer_loss,
        "psnr": jnp.mean(tokenizer_losses.psnr(images_BHWC, autoencoder.from_pixel_range(cfg, pixels))),
        "codebook_use": use,
        "perplexity": perplexity,
    }
    grads = {}
    if cfg.adversarial is not None:
        adversarial_grad, grads["discriminator"], more = _adversarial_step(
            cfg.adversarial,
            params["discriminator"],
            real,
            pixels,
            pixel_grad,
            params["tokenizer"]["decoder"]["conv_out"],
            features,
            step,
        )
        pixel_grad += adversarial_grad
        metrics |= more
    grads["tokenizer"] = backward((pixel_grad, jnp.ones_like(quantizer_loss)))[0]
    return grads, metrics, {"latents": latents, "codes": codes} if cfg.restarts_dead_codes else {}


def _perceptual_distance(cfg: VQGANConfig, lpips: Params | None, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the mean LPIPS, or without its weights the mean pyramid distance, of images in the tokenizer's pixel
    range; scalar."""
    if cfg.perceptual_weight == 0:
        return jnp.float32(0.0)
    if lpips is None:
        return jnp.mean(laplacian_pyramid_loss(x, y))
    if cfg.pixel_range == "unit":
        x, y = 2 * x - 1, 2 * y - 1
    return jnp.mean(perceptual.lpips(lpips, x, y))


def _adversarial_step(
    cfg: AdversarialConfig,
    params: Params,
    real: jax.Array,
    pixels: jax.Array,
    reconstruction_grad: jax.Array,
    conv_out: Params,
    features: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
    """Compute the gradient of the weighted adversarial term at `pixels`, the discriminator's gradients, and metrics.

    conv_out, features: parameters and input of the decoder's last convolution.
    """

    def last_layer(kernel):
        conv = nn.Conv(3, (3, 3), padding=1)
        return apply_module(conv, {"kernel": kernel, "bias": conv_out["bias"]}, features)

    def full_discriminator_loss(params):
        images = jax.lax.stop_gradient(jnp.concatenate([real, pixels]))
        real_logits, fake_logits = jnp.split(discriminator.patch_logits(cfg, params, images), 2)
        r1 = jnp.float32(0.0)
        if cfg.r1_weight:
            r1 = jax.lax.cond(
                step % cfg.r1_every == 0,
                lambda params: r1_penalty(cfg, params, real),
                lambda params: jnp.float32(0.0),
                params,
            )
        value = discriminator_loss(cfg.loss, real_logits, fake_logits)
        return value + cfg.r1_weight * cfg.r1_every * r1, (value, real_logits, fake_logits)

    def adversarial_term(pixels):
        return generator_loss(cfg.loss, discriminator.patch_logits(cfg, params, pixels))

    def started(pixels):
        adversarial_grad = jax.grad(adversarial_term)(pixels)
        _, to_kernel = jax.vjp(last_layer, conv_out["kernel"])
        norm_rec, norm_adv = (
            jnp.linalg.norm(to_kernel(grad)[0]) for grad in (reconstruction_grad, adversarial_grad)
        )
        adaptive = jnp.clip(norm_rec / (norm_adv + 1e-4), 0.0, cfg.max_adaptive_weight)
        grads, (value, real_logits, fake_logits) = jax.grad(full_discriminator_loss, has_aux=True)(params)
        metrics = {
            "discriminator_loss": value,
            "log_d_real": jnp.mean(jax.nn.log_sigmoid(real_logits)),
            "log_d_fake": jnp.mean(jax.nn.log_sigmoid(fake_logits)),
            "adaptive_weight": adaptive,
            "norm_reconstruction": norm_rec,
            "norm_adversarial": norm_adv,
        }
        return cfg.weight * disc_factor(cfg, step) * adaptive * adversarial_grad, grads, metrics

    def not_started(pixels):
        names = (
            "discriminator_loss",
            "log_d_real",
            "log_d_fake",
            "adaptive_weight",
            "norm_reconstruction",
            "norm_adversarial",
        )
        metrics = dict.fromkeys(names, jnp.float32(jnp.nan))
        return jnp.zeros_like(pixels), jax.tree.map(jnp.zeros_like, params), metrics

    grad, grads, metrics = jax.lax.cond(step >= cfg.disc_start_step, started, not_started, pixels)
    return grad, grads, {**metrics, "disc_factor": disc_factor(cfg, step)}
