"""CLIP on scenes of up to four objects, 64 x 64 pixels, to re-rank the samples of scenes_dalle.

Paper: Radford et al. 2021, arXiv 2103.00020, at 21 million parameters.
Hardware: one GPU. Time: written for 15 minutes; not trained. Score: none.

    dalle-jax train scenes_clip
    dalle-jax evaluate runs/scenes_dalle --clip runs/scenes_clip --candidates 64
"""

from dalle_jax.config import (
    ClipConfig,
    DataConfig,
    OptimConfig,
    ScenesSource,
    TextConfig,
    TowerConfig,
    TrainConfig,
)

config = TrainConfig(
    run="runs/scenes_clip",
    model=ClipConfig(
        image_size=64,
        patch_size=8,
        vision=TowerConfig(dim=384, layers=8, heads=6),
        text=TowerConfig(dim=256, layers=8, heads=4),
        text_vocab=1024,
        text_len=66,
        embed_dim=256,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.25, 0.25, 0.25),
    ),
    data=DataConfig(source=ScenesSource(count=4_000_000), batch_size=512, num_threads=12, prefetch=16),
    text=TextConfig(num_train_captions=100_000, bpe_dropout=0.1),
    optim=OptimConfig(
        learning_rate=1e-3,
        warmup_steps=500,
        b2=0.98,
        weight_decay=0.1,
        clip_norm=1.0,
        ema_decay=0.999,
        ema_every=1,
    ),
    steps=10_000,
    eval_every=1_000,
    save_every=1_000,
    sample_every=2_000,
    eval_rows=512,
)
