"""Real pictures: a tar of emoji (or any tar of pictures) at 32 x 32 pixels to 8 x 8
codes of 512: the tokenizer.

Paper: 2102.12092, 2.1, at a small size. Hardware: two CPU cores. Time and score: docs/data.md.

    python train.py configs/emoji_dvae.py --data.source.path emoji-64.tar
"""

import dataclasses

from dalle_jax.config import DataConfig, Schedule, TarSource
from dalle_jax.config.files import load_config

_demo = load_config("demo_dvae")
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
