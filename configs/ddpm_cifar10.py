"""Diffusion on CIFAR-10 without conditions: network, noise schedule and optimizer of the DDPM paper.

Paper: Ho et al. 2020, arXiv 2006.11239, B: 35,746,307 parameters, 800,000 steps of 128 images, FID 3.17 there. Data:
TFDS `cifar10` in array_record format, or an npz file (docs/data.md).
Hardware: one GPU. Time: not trained. Score: shapes are tested; a reduced run is in docs/diffusion.md.

    dalle-jax train ddpm_cifar10 --data.path cifar10.npz
    dalle-jax evaluate runs/ddpm_cifar10 --fid-weights inception.npz --count 10000 --sampler ddim --num-steps 50
"""

from dalle_jax.config import DataConfig, DiffusionConfig, OptimConfig, TfdsSource, TrainConfig

config = TrainConfig(
    run="runs/ddpm_cifar10",
    model=DiffusionConfig(dtype="bfloat16"),  # the defaults are the paper's network
    data=DataConfig(source=TfdsSource(path="cifar10"), batch_size=128, num_threads=8, prefetch=16),
    optim=OptimConfig(
        learning_rate=2e-4, warmup_steps=5_000, schedule="constant", b2=0.999, weight_decay=0.0, clip_norm=1.0,
        ema_decay=0.9999, ema_every=1,
    ),
    steps=800_000,
    log_every=100,
    eval_every=5_000,
    eval_rows=1_024,
    sample_every=5_000,
    save_every=5_000,
)  # fmt: skip
