"""Gaussian diffusion: noise schedules, U-Net, loss, samplers and likelihood."""
