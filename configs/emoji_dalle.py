"""Transformer from English and Chinese captions of emoji to the codes of emoji_dvae.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.2, at a small size.
Hardware: two CPU cores. Time: four minutes for 1,200 of 12,000 steps. Score: image loss 2.66 nats per code after them
(docs/data.md).

    dalle-jax train emoji_dalle --data.path emoji-64.tar
"""

import dataclasses

from dalle_jax.config import DataConfig, TarSource, TextConfig
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dalle")

config = dataclasses.replace(
    _demo,
    run="runs/emoji_dalle",
    image_tokenizer="runs/emoji_dvae",
    model=dataclasses.replace(_demo.model, text_vocab=4096, text_len=24, image_vocab=512),
    data=DataConfig(source=TarSource(path=""), batch_size=_demo.data.batch_size),
    text=TextConfig(num_train_captions=100_000, bpe_dropout=0.1),
    steps=12_000,
    eval_every=1_000,
    save_every=1_000,
    sample_every=2_000,
)
