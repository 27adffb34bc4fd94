"""Discrete VAE on CIFAR-10, 32 x 32 pixels to 8 x 8 codes of 1,024.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.1, at a small size. Data: Krizhevsky 2009, "Learning multiple layers of
features from tiny images".
Hardware: two CPU cores. Time: 9 minutes, cores shared. Score: PSNR 21.0 dB, 76% of the codes in use (docs/data.md).

    dalle-jax train cifar10_dvae --data.path cifar10.npz
"""

import dataclasses

from dalle_jax.config import ArraysSource, DataConfig, Schedule
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dvae")
STEPS = 1_500

config = dataclasses.replace(
    _demo,
    run="runs/cifar10_dvae",
    model=dataclasses.replace(_demo.model, vocab=1024, tau=Schedule(start=1.0, end=0.3, steps=STEPS)),
    data=DataConfig(source=ArraysSource(), batch_size=_demo.data.batch_size),
    steps=STEPS,
    eval_every=500,
    save_every=500,
    sample_every=STEPS,
)
