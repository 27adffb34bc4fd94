"""Transformer of the demo: English and Chinese captions of its scenes to the codes of demo_dvae.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.2, at a very small size. `dalle-jax demo` trains this configuration.
Hardware: two CPU cores. Time: 337 s. Score: 92.5% of samples correct, 85.5% on held-out color-shape pairs
(docs/scenes.md).

    dalle-jax train demo_dalle
"""

import dataclasses

from dalle_jax.config import DalleConfig, OptimConfig, TextConfig, TrainConfig
from dalle_jax.config.files import load_shipped_config

_tokenizer = load_shipped_config("demo_dvae")
STEPS = 3_000

config = TrainConfig(
    run="runs/demo/dalle",
    image_tokenizer=_tokenizer.run,
    model=DalleConfig(
        text_vocab=768,
        text_len=16,
        image_vocab=128,
        grid=8,
        dim=128,
        layers=5,
        heads=4,
        attention=("full",),
        last_attention=None,
        qk_norm=True,
        dtype="float32",
        remat="none",
    ),
    data=dataclasses.replace(_tokenizer.data, batch_size=32),
    text=TextConfig(num_train_captions=20_000, bpe_dropout=0.0),
    optim=OptimConfig(
        learning_rate=3e-3,
        warmup_steps=100,
        b2=0.99,
        weight_decay=0.01,
        clip_norm=1.0,
        ema_decay=0.995,
        ema_every=1,
    ),
    mesh=_tokenizer.mesh,
    steps=STEPS,
    eval_every=500,
    save_every=500,
    sample_every=STEPS,
    eval_rows=256,
    log_every=50,
)
