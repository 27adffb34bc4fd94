"""Discrete VAE on a tar file of emoji or other images, 32 x 32 pixels to 8 x 8 codes of 512.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.1, at a small size.
Hardware: two CPU cores. Time: three minutes for 5,000 of 12,000 steps. Score: PSNR 21.7 dB, 95% of the codes in use
after them (docs/data.md).

    dalle-jax train emoji_dvae --data.path emoji-64.tar
"""

import dataclasses

from dalle_jax.config import DataConfig, Schedule, TarSource
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dvae")
STEPS = 12_000

config = dataclasses.replace(
    _demo,
    run="runs/emoji_dvae",
    model=dataclasses.replace(
        _demo.model,
        vocab=512,
        tau=Schedule(start=1.0, end=0.3, steps=STEPS),
    ),
    data=DataConfig(source=TarSource(path=""), batch_size=_demo.data.batch_size),
    steps=STEPS,
    eval_every=1_000,
    save_every=1_000,
    sample_every=2_000,
)
