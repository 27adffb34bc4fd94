"""VQGAN: autoencoder, quantizers, discriminator and adversarial training, each in a module of its own."""

from dalle_jax.models.vqgan import adversarial, autoencoder, discriminator, quantizers

__all__ = ["adversarial", "autoencoder", "discriminator", "quantizers"]
