"""Gaussian diffusion: noise schedules, U-Net, loss, samplers and likelihood, each in a module of its own."""

from dalle_jax.models.diffusion import denoise, likelihood, loss, sampler, schedule, text_encoder, unet

__all__ = ["denoise", "likelihood", "loss", "sampler", "schedule", "text_encoder", "unet"]
