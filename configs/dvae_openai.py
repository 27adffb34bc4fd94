"""Discrete VAE of the paper at full size: 256 x 256 pixels to 32 x 32 codes of 8192.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.1 and A: encoder 53,786,240 and decoder 43,829,766 parameters; trained
there on 64 V100, batch 512, for 3,000,000 steps.
Hardware: a TPU slice or several GPUs. Time: not trained. Score: shapes are tested.

    dalle-jax train dvae_openai --data.source.path "shards/*.tar"
"""

from dalle_jax.config import DataConfig, DVAEConfig, MeshConfig, OptimConfig, TarSource, TrainConfig

config = TrainConfig(
    run="runs/dvae_openai",
    model=DVAEConfig(dtype="bfloat16"),  # every other field has the paper's value by default
    data=DataConfig(
        source=TarSource(path=""),
        batch_size=512,
        crop="random",
        languages=("en",),
        num_threads=16,
        prefetch=8,
    ),
    optim=OptimConfig(
        learning_rate=1e-4,
        warmup_steps=0,
        decay_steps=1_200_000,
        final_lr_ratio=0.0125,  # to 1.25e-6
        b2=0.999,
        weight_decay=1e-4,
        clip_norm=0.0,
        ema_decay=0.999,
        ema_every=1,
    ),
    mesh=MeshConfig(data=-1, fsdp=1),
    steps=3_000_000,
    log_every=100,
    eval_every=10_000,
    save_every=10_000,
    sample_every=10_000,
    eval_rows=1024,
)
