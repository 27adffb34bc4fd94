"""Gaussian diffusion: schedules, samplers, likelihood."""
