"""Discrete VAE on the photographs of Flickr8k, 32 x 32 pixels to 8 x 8 codes of 512.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.1, at a small size. Data: Hodosh et al. 2013, "Framing image
description as a ranking task".
Hardware: two CPU cores. Time: not recorded. Score: PSNR 21.4 dB, 98.5% of the codes in use (docs/data.md).

    dalle-jax train flickr8k_dvae --data.path flickr8k.tar
"""

import dataclasses

from dalle_jax.config import DataConfig, Schedule, TarSource
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dvae")
STEPS = 2_500

config = dataclasses.replace(
    _demo,
    run="runs/flickr8k_dvae",
    model=dataclasses.replace(_demo.model, vocab=512, tau=Schedule(start=1.0, end=0.3, steps=STEPS)),
    data=DataConfig(source=TarSource(), batch_size=_demo.data.batch_size),
    steps=STEPS,
    eval_every=500,
    save_every=500,
    sample_every=STEPS,
)
