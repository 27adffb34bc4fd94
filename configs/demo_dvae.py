"""Discrete VAE of the demo: scenes of one large object, 32 x 32 pixels to 8 x 8 codes of 128.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.1, at a very small size. `dalle-jax demo` trains this configuration.
Hardware: two CPU cores. Time: 132 s. Score: PSNR 28.1 dB, 98.4% of the codes in use (docs/scenes.md).

    dalle-jax train demo_dvae
"""

from dalle_jax.config import (
    DataConfig,
    DVAEConfig,
    MeshConfig,
    OptimConfig,
    ScenesSource,
    Schedule,
    TrainConfig,
)

STEPS = 4_000

config = TrainConfig(
    run="runs/demo/dvae",
    model=DVAEConfig(
        image_size=32,
        groups=3,
        blocks=1,
        width=32,
        decoder_width=64,
        vocab=128,
        tau=Schedule(start=1.0, end=0.3, steps=STEPS),
        kl_weight=Schedule(start=0.1, end=0.1, steps=0),
        code_usage_weight=Schedule(start=0.05, end=0.05, steps=0),
        min_scale=0.3,
    ),
    # One plain shape per image: what networks of this size learn in minutes. configs/scenes_*.py train on the whole
    # data set, with up to four objects, fills and relations.
    data=DataConfig(
        batch_size=16,
        source=ScenesSource(
            min_objects=1, max_objects=1, sizes=("large",), fills=("solid",), backgrounds=("plain",)
        ),
    ),
    optim=OptimConfig(
        learning_rate=4e-3,
        warmup_steps=100,
        final_lr_ratio=0.02,
        b2=0.99,
        weight_decay=0.0,
        ema_decay=0.99,
        ema_every=1,
    ),
    mesh=MeshConfig(cpu_devices=2),
    steps=STEPS,
    eval_every=1_000,
    save_every=1_000,
    sample_every=STEPS,
    eval_rows=256,
    log_every=50,
)
