"""Diffusion on scenes of up to four objects, 64 x 64 pixels, from English and Chinese captions.

Paper: Ho et al. 2020, arXiv 2006.11239, and 2112.10741 at 36 million parameters; v-prediction (2202.00512) on a
cosine schedule.
Hardware: one GPU. Time: not trained. Score: none.

    dalle-jax train diffusion_scenes
    dalle-jax evaluate runs/diffusion_scenes --guidance-scale 1 2 4
"""

from dalle_jax.config import (
    DataConfig,
    DiffusionConfig,
    NoiseConfig,
    OptimConfig,
    ScenesSource,
    TextConfig,
    TextEncoderConfig,
    TrainConfig,
)

config = TrainConfig(
    run="runs/diffusion_scenes",
    model=DiffusionConfig(
        image_size=64,
        patch_size=2,
        width=128,
        channel_multipliers=(1, 2, 2),
        attention_sizes=(16, 8),
        head_dim=64,
        scale_shift_norm=True,
        dropout=0.0,
        text=TextEncoderConfig(text_vocab=1024, text_len=64, dim=256, layers=6, heads=4),
        noise=NoiseConfig(kind="cosine"),
        prediction="v",
        weighting="min_snr",
        dtype="bfloat16",
    ),
    data=DataConfig(source=ScenesSource(count=4_000_000), batch_size=128, num_threads=12, prefetch=16),
    text=TextConfig(num_train_captions=100_000, bpe_dropout=0.1),
    optim=OptimConfig(
        learning_rate=3e-4,
        warmup_steps=500,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
        ema_decay=0.999,
        ema_every=1,
    ),
    steps=30_000,
    eval_every=1_000,
    save_every=1_000,
    sample_every=3_000,
    eval_rows=512,
)
