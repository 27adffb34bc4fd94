"""Transformer from English and Chinese captions of photographs to the codes of flickr8k_dvae.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.2, at a small size.
Hardware: two CPU cores. Time: 10 minutes for 600 of 2,500 steps, cores shared. Score: 4.46 nats per code after them
(docs/data.md).

    dalle-jax encode runs/flickr8k_dvae --data flickr8k.tar --out flickr8k_codes
    dalle-jax train flickr8k_dalle --data.path flickr8k.tar --data.codes flickr8k_codes
"""

import dataclasses

from dalle_jax.config import DataConfig, TarSource, TextConfig
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dalle")

config = dataclasses.replace(
    _demo,
    run="runs/flickr8k_dalle",
    image_tokenizer="runs/flickr8k_dvae",
    model=dataclasses.replace(_demo.model, text_vocab=4096, text_len=24, image_vocab=512),
    data=DataConfig(source=TarSource(), batch_size=_demo.data.batch_size),
    text=TextConfig(num_train_captions=60_000, bpe_dropout=0.1),
    steps=2_500,
    eval_every=500,
    save_every=500,
    sample_every=1_250,
)
