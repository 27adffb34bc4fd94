"""VQGAN: autoencoder, quantizers, discriminator and adversarial training."""
