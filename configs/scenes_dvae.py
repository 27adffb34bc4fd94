"""Discrete VAE on scenes of up to four objects, 64 x 64 pixels to 16 x 16 codes of 2048.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.1, at a small size.
Hardware: one GPU. Time: written for 15 minutes; not trained. Score: reduced to a CPU, PSNR 27.5 dB (docs/scenes.md).

    dalle-jax train scenes_dvae
"""

from dalle_jax.config import DataConfig, DVAEConfig, OptimConfig, ScenesSource, Schedule, TrainConfig

STEPS = 20_000

config = TrainConfig(
    run="runs/scenes_dvae",
    model=DVAEConfig(
        image_size=64,
        groups=3,
        blocks=2,
        width=64,
        decoder_width=128,
        vocab=2048,
        tau=Schedule(start=1.0, end=0.3, steps=STEPS),
        kl_weight=Schedule(start=0.1, end=0.1, steps=0),
        code_usage_weight=Schedule(start=0.05, end=0.05, steps=0),
        min_scale=0.3,
        dtype="bfloat16",
    ),
    data=DataConfig(source=ScenesSource(), batch_size=64, num_threads=8, prefetch=16),
    optim=OptimConfig(
        learning_rate=2e-3,
        warmup_steps=500,
        final_lr_ratio=0.02,
        b2=0.99,
        weight_decay=1e-4,
        clip_norm=1.0,
        ema_decay=0.999,
        ema_every=1,
    ),
    steps=STEPS,
    eval_every=1_000,
    save_every=1_000,
    sample_every=2_000,
    eval_rows=512,
)
