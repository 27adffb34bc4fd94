"""Diffusion on the demo's scenes from English captions, 32 x 32 pixels: a U-Net small enough for a CPU.

Paper: Ho et al. 2020, arXiv 2006.11239, with captions as in 2112.10741, at a small size; the network has one position
per 2 x 2 pixels.
Hardware: two CPU cores. Time: 18 minutes idle, 41 minutes shared. Score: 87.5% of samples correct, 87.5% on held-out
color-shape pairs, at guidance 2 (docs/diffusion.md).

    dalle-jax train demo_diffusion
    dalle-jax sample runs/demo_diffusion "a large red star" --num-images 4 --guidance-scale 2
"""

import dataclasses

from dalle_jax.config import DiffusionConfig, NoiseConfig, TextConfig, TextEncoderConfig, TrainConfig
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dvae")
STEPS = 6_000

config = TrainConfig(
    run="runs/demo_diffusion",
    model=DiffusionConfig(
        image_size=32,
        patch_size=2,
        width=32,
        channel_multipliers=(1, 2, 4),
        blocks=1,
        attention_sizes=(8,),
        dropout=0.0,
        text=TextEncoderConfig(text_vocab=768, text_len=16, dim=64, layers=2, heads=4),
        noise=NoiseConfig(kind="cosine"),
        prediction="x0",  # weighs high noise, where color and shape are decided, as much as low
    ),
    data=dataclasses.replace(_demo.data, batch_size=32, languages=("en",)),
    text=TextConfig(num_train_captions=20_000, bpe_dropout=0.0),
    optim=dataclasses.replace(
        _demo.optim, learning_rate=2e-3, weight_decay=0.0, clip_norm=1.0, ema_decay=0.995, ema_every=1
    ),
    mesh=_demo.mesh,
    steps=STEPS,
    log_every=25,
    eval_every=STEPS // 6,
    save_every=STEPS // 20,
    sample_every=STEPS // 2,
    eval_rows=128,
)
