"""CLIP on the demo's scenes, English and Chinese captions, to re-rank the samples of demo_dalle.

Paper: Radford et al. 2021, arXiv 2103.00020, at a very small size.
Hardware: two CPU cores. Time: 0.22 to 0.34 s per step, cores shared. Score: best of 64 samples correct 7.8 points
more often than one (docs/clip.md).

    dalle-jax train demo_clip
    dalle-jax train demo_clip --image-tokenizer runs/demo/dvae
    dalle-jax sample runs/demo/dalle "a red circle" --clip runs/demo_clip --candidates 64 --top 4
"""

from dalle_jax.config import ClipConfig, DataConfig, OptimConfig, TextConfig, TowerConfig, TrainConfig
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dvae")
STEPS = 2_000

config = TrainConfig(
    run="runs/demo_clip",
    model=ClipConfig(
        image_size=32,
        patch_size=8,
        vision=TowerConfig(dim=128, layers=4, heads=4),
        text=TowerConfig(dim=128, layers=2, heads=4),
        text_vocab=768,
        text_len=18,
        embed_dim=64,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.25, 0.25, 0.25),
        dtype="float32",
    ),
    data=DataConfig(batch_size=64, source=_demo.data.source),
    text=TextConfig(num_train_captions=20_000, bpe_dropout=0.0),
    optim=OptimConfig(
        learning_rate=1e-3,
        warmup_steps=100,
        b2=0.98,
        weight_decay=0.1,
        clip_norm=1.0,
        ema_decay=0.99,
        ema_every=1,
    ),
    mesh=_demo.mesh,
    steps=STEPS,
    log_every=50,
    eval_every=STEPS // 4,
    save_every=STEPS // 4,
    sample_every=STEPS,
)
