"""Transformer from English and Chinese captions of scenes of up to four objects to the codes of scenes_dvae.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.2, at 41 million parameters.
Hardware: one GPU. Time: written for 15 minutes; not trained. Score: reduced to a CPU, 71% of samples of one object
correct, 20% of two (docs/scenes.md).

    dalle-jax train scenes_dalle
    dalle-jax evaluate runs/scenes_dalle --guidance-scale 1 1.5 2 3 4
"""

from dalle_jax.config import DalleConfig, DataConfig, OptimConfig, ScenesSource, TextConfig, TrainConfig

config = TrainConfig(
    run="runs/scenes_dalle",
    image_tokenizer="runs/scenes_dvae",
    model=DalleConfig(
        text_vocab=1024,
        text_len=64,
        image_vocab=2048,
        grid=16,
        dim=512,
        layers=12,
        heads=8,
        qk_norm=True,
        dtype="bfloat16",
        remat="none",
    ),
    data=DataConfig(source=ScenesSource(count=4_000_000), batch_size=128, num_threads=12, prefetch=16),
    text=TextConfig(num_train_captions=100_000, bpe_dropout=0.1),
    optim=OptimConfig(
        learning_rate=1e-3, warmup_steps=500, b2=0.98, clip_norm=1.0, ema_decay=0.999, ema_every=1
    ),
    steps=15_000,
    eval_every=1_000,
    save_every=1_000,
    sample_every=3_000,
    eval_rows=512,
)
