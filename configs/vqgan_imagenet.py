"""VQGAN of taming-transformers at full size: 256 x 256 pixels to 16 x 16 codes of 16,384.

Paper: Esser et al. 2020, arXiv 2012.09841; sizes of the published f16-16384 (76,073,859 parameters).
Hardware: a TPU slice or several GPUs. Time: not trained. Score: shapes are tested.

    dalle-jax train vqgan_imagenet --data.source.path "shards/*.tar" --model.lpips lpips_vgg16.npz
"""

from dalle_jax.config import DataConfig, MeshConfig, OptimConfig, TarSource, TrainConfig, VQGANConfig

BATCH = 96

config = TrainConfig(
    run="runs/vqgan_imagenet",
    model=VQGANConfig(dtype="bfloat16"),  # every other field has the published value by default
    data=DataConfig(
        source=TarSource(path=""),
        batch_size=BATCH,
        crop="random",
        languages=("en",),
        num_threads=16,
        prefetch=8,
    ),
    optim=OptimConfig(
        learning_rate=4.5e-6 * BATCH,  # the published base rate, times the batch
        warmup_steps=0,
        schedule="constant",
        b1=0.5,
        b2=0.9,
        weight_decay=0.0,
        clip_norm=0.0,
        ema_decay=0.999,
        ema_every=1,
    ),
    mesh=MeshConfig(data=-1, fsdp=1),
    steps=1_000_000,
    log_every=100,
    eval_every=10_000,
    save_every=10_000,
    sample_every=10_000,
    eval_rows=1024,
)
