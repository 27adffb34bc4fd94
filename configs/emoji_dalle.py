"""Real pictures and captions, English and Chinese: the Transformer over the codes of configs/emoji_dvae.py.

Paper: 2102.12092, 2.2, at a small size. Hardware: two CPU cores. Time and score: docs/data.md.

    python train.py configs/emoji_dalle.py --data.source.path emoji-64.tar
"""

import dataclasses

from dalle_jax.config import DataConfig, TarSource, TextConfig
from dalle_jax.config.files import load_config

_demo = load_config("demo_dalle")

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
