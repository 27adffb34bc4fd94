"""Training of VQGAN: a tokenizer against a discriminator (Esser et al. 2020, 2012.09841, 3.1).

    L = pixel_weight |x - x'| + perceptual_weight d(x, x') + quantizer loss + weight ramp lambda L_G
    lambda = |grad L_rec| / (|grad L_G| + 1e-4), gradients at the decoder's last convolution
    non-saturating: L_G = -E log D(x'), L_D = -E log D(x) - E log(1 - D(x'))       (Goodfellow et al. 2014)
    hinge:          L_G = -E s(x'),     L_D = (E max(0, 1 - s(x)) + E max(0, 1 + s(x'))) / 2

D = sigmoid(s). The two networks learn from one forward pass: the gradient of each term is taken at the picture x'
first, where the terms are weighed, and goes through the tokenizer once.

A discriminator that is switched on late is random at first; at full weight its noise is as strong as the
reconstruction's gradient, since lambda makes them equal. So the decoder's term rises from 0 over `ramp` updates while
the discriminator learns, and R1 (Mescheder et al. 2018, 1801.04406) keeps its slope at real pictures low.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import AdversarialConfig, GumbelQuantizer, VQGANConfig
from dalle_jax.models import lpips as perceptual
from dalle_jax.models import tokenizer_losses
from dalle_jax.models.vqgan import autoencoder, discriminator
from dalle_jax.typing import Params


def init(cfg: VQGANConfig, key: jax.Array) -> Params:
    """`{"tokenizer": ...}`, and `"discriminator"` where `cfg.adversarial` is set; float32."""
    k_tokenizer, k_discriminator = jax.random.split(key)
    params = {"tokenizer": autoencoder.init(cfg, k_tokenizer)}
    if cfg.adversarial is not None:
        params["discriminator"] = discriminator.init(cfg.adversarial, cfg.image_size, k_discriminator)
    return params


def generator_loss(kind: str, fake: jax.Array) -> jax.Array:
    """L_G of the scores of generated pictures; scalar."""
    if kind == "hinge":
        return -jnp.mean(fake)
    return -jnp.mean(jax.nn.log_sigmoid(fake))


def discriminator_loss(kind: str, real: jax.Array, fake: jax.Array) -> jax.Array:
    """L_D of the scores of real and generated pictures; scalar."""
    if kind == "hinge":
        return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2
    return -jnp.mean(jax.nn.log_sigmoid(real)) - jnp.mean(jax.nn.log_sigmoid(-fake))


def r1_penalty(cfg: AdversarialConfig, params: Params, real_BHWC: jax.Array) -> jax.Array:
    """Half the mean squared norm of the gradient of a picture's score, the mean over its patches, at real ones."""

    def score(x):
        return jnp.sum(jnp.mean(discriminator.patch_logits(cfg, params, x), axis=(1, 2)))

    return 0.5 * jnp.mean(jnp.sum(jnp.square(jax.grad(score)(real_BHWC)), axis=(1, 2, 3)))


def disc_factor(cfg: AdversarialConfig, step: jax.Array) -> jax.Array:
    """Share of the adversarial weight after `step` updates: 0 up to `start`, then a line to 1; float32."""
    since = (step - cfg.disc_start_step).astype(jnp.float32)
    return jnp.where(since < 0, 0.0, jnp.clip((since + 1) / max(cfg.disc_warmup_steps, 1), 0.0, 1.0))


def adversarial_gradients(
    cfg: VQGANConfig,
    params: Params,
    lpips: Params | None,
    images_BHWC: jax.Array,
    key: jax.Array,
    step: jax.Array,
) -> tuple[Params, dict[str, jax.Array], dict[str, jax.Array]]:
    """Gradients of both networks at one batch, measures, and what each picture leaves for `quantize.restart`.

    params: of `init`. lpips: of `perceptual.load_lpips`, or None for the pyramid. images_BHWC: float in [0, 1].
    step: int32, updates done. Returns gradients of the form of `params` (zeros for a discriminator that has not
    begun) and float32 scalars: `loss` (the tokenizer's, without the adversarial term), `pixel`, `perceptual`,
    `quantizer`, `psnr`, `codebook_use`, `perplexity`; with a discriminator also `discriminator_loss`, `log_d_real`,
    `log_d_fake` (log D(x'), not log(1 - D)), `adversarial_ramp`, `adaptive_weight`, and the norms of the two
    gradients at the last layer, `norm_reconstruction`, `norm_adversarial`: NaN before it begins. What pictures leave
    is `latents` and `codes`, (B, h, w, ...), or {} where no codes are restarted.
    """
    k_quantize = key
    tau = jnp.float32(1.0)
    if isinstance(cfg.quantizer, GumbelQuantizer):
        tau = tokenizer_losses.schedule_value(cfg.quantizer.tau, step)
    real = autoencoder.to_pixel_range(cfg, images_BHWC.astype(jnp.float32))

    def forward(tokenizer):
        out = autoencoder.reconstruct(cfg, tokenizer, images_BHWC, k_quantize, tau)
        return (out.pixels, out.loss), (out.features, out.latents, out.codes)

    def reconstruction(pixels):
        pixel = jnp.mean(jnp.abs(real - pixels))
        seen = perceptual_distance(cfg, lpips, real, pixels)
        return cfg.pixel_weight * pixel + cfg.perceptual_weight * seen, (pixel, seen)

    (pixels, quantizer_loss), backward, (features, latents, codes) = jax.vjp(
        forward, params["tokenizer"], has_aux=True
    )
    (value, (pixel, seen)), grad = jax.value_and_grad(reconstruction, has_aux=True)(pixels)
    use, perplexity = tokenizer_losses.codebook_use(codes, cfg.vocab)
    measures = {
        "loss": value + quantizer_loss,
        "pixel": pixel,
        "perceptual": seen,
        "quantizer": quantizer_loss,
        "psnr": jnp.mean(tokenizer_losses.psnr(images_BHWC, autoencoder.from_pixel_range(cfg, pixels))),
        "codebook_use": use,
        "perplexity": perplexity,
    }
    grads = {}
    if cfg.adversarial is not None:
        last = (params["tokenizer"]["decoder"]["conv_out"], features)
        push, grads["discriminator"], more = _against(
            cfg.adversarial, params["discriminator"], real, pixels, grad, last, step
        )
        grad += push
        measures |= more
    grads["tokenizer"] = backward((grad, jnp.ones_like(quantizer_loss)))[0]
    return grads, measures, {"latents": latents, "codes": codes} if cfg.restarts_dead_codes else {}


def perceptual_distance(cfg: VQGANConfig, lpips: Params | None, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean LPIPS, or without its weights mean pyramid distance, of pictures in the tokenizer's range; scalar."""
    if cfg.perceptual_weight == 0:
        return jnp.float32(0.0)
    if lpips is None:
        return jnp.mean(perceptual.laplacian_pyramid_loss(x, y))
    if cfg.pixel_range == "unit":
        x, y = 2 * x - 1, 2 * y - 1
    return jnp.mean(perceptual.lpips(lpips, x, y))


def _against(cfg, params, real, pixels, grad_rec, last, step):
    """Gradient of the weighed adversarial term at `pixels`, the discriminator's own gradients, and measures."""
    (conv_out, features), nan = last, jnp.float32(jnp.nan)

    def out(kernel):
        conv = nn.Conv(3, (3, 3), padding=1)
        return conv.apply({"params": {"kernel": kernel, "bias": conv_out["bias"]}}, features)

    def judge(params):
        return discriminator.patch_logits(cfg, params, jax.lax.stop_gradient(jnp.concatenate([real, pixels])))

    def lose(params):
        real_s, fake_s = jnp.split(judge(params), 2)
        due = step % cfg.r1_every == 0
        r1 = jnp.float32(0.0)
        if cfg.r1_weight:
            r1 = jax.lax.cond(due, lambda p: r1_penalty(cfg, p, real), lambda p: jnp.float32(0.0), params)
        value = discriminator_loss(cfg.loss, real_s, fake_s)
        return value + cfg.r1_weight * cfg.r1_every * r1, (value, real_s, fake_s)

    def begun(pixels):
        grad_adv = jax.grad(lambda x: generator_loss(cfg.loss, discriminator.patch_logits(cfg, params, x)))(
            pixels
        )
        _, to_kernel = jax.vjp(out, conv_out["kernel"])
        norm_rec, norm_adv = (jnp.linalg.norm(to_kernel(g)[0]) for g in (grad_rec, grad_adv))
        adaptive = jnp.clip(norm_rec / (norm_adv + 1e-4), 0.0, cfg.max_adaptive_weight)
        grads, (value, real_s, fake_s) = jax.grad(lose, has_aux=True)(params)
        measures = {
            "discriminator_loss": value,
            "log_d_real": jnp.mean(jax.nn.log_sigmoid(real_s)),
            "log_d_fake": jnp.mean(jax.nn.log_sigmoid(fake_s)),
            "adaptive_weight": adaptive,
            "norm_reconstruction": norm_rec,
            "norm_adversarial": norm_adv,
        }
        return cfg.weight * disc_factor(cfg, step) * adaptive * grad_adv, grads, measures

    def waiting(pixels):
        names = ("discriminator_loss", "log_d_real", "log_d_fake", "adaptive_weight",
                 "norm_reconstruction", "norm_adversarial")  # fmt: skip
        return jnp.zeros_like(pixels), jax.tree.map(jnp.zeros_like, params), dict.fromkeys(names, nan)

    push, grads, measures = jax.lax.cond(step >= cfg.disc_start_step, begun, waiting, pixels)
    return push, grads, {**measures, "adversarial_ramp": disc_factor(cfg, step)}
