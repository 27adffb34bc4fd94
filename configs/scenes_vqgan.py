"""VQGAN on scenes of up to four objects, 64 x 64 pixels to 16 x 16 codes of 2048; adversarial in its second half.

Paper: Esser et al. 2020, arXiv 2012.09841, at a small size; codes are compared on the unit sphere (Yu et al. 2021,
arXiv 2110.04627).
Hardware: one GPU. Time: not trained. Score: none; a small one is in docs/tokenizers.md.

    dalle-jax train scenes_vqgan --model.lpips lpips_vgg16.npz
"""

from dalle_jax.config import (
    AdversarialConfig,
    DataConfig,
    OptimConfig,
    ScenesSource,
    TrainConfig,
    VectorQuantizer,
    VQGANConfig,
)

STEPS = 20_000

config = TrainConfig(
    run="runs/scenes_vqgan",
    model=VQGANConfig(
        image_size=64,
        width=64,
        channel_multipliers=(1, 2, 2),
        blocks=2,
        attention_levels=(2,),
        latent_width=128,
        quantizer=VectorQuantizer(vocab=2048, dim=8, normalize=True),
        adversarial=AdversarialConfig(disc_start_step=STEPS // 2, disc_warmup_steps=2_000, layers=3),
        dtype="bfloat16",
    ),
    data=DataConfig(source=ScenesSource(), batch_size=64, num_threads=8, prefetch=16),
    optim=OptimConfig(
        learning_rate=5e-4,
        warmup_steps=500,
        final_lr_ratio=0.1,
        b1=0.5,
        b2=0.99,
        weight_decay=0.0,
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
