"""Transformer from class captions of CIFAR-10 ("a photo of a horse") to the codes of cifar10_dvae.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.2, at a small size.
Hardware: two CPU cores. Time: 20 minutes for 1,500 steps, cores shared. Score: 3.82 nats per code; class accuracy
23.8% at guidance 3, upper bound 26.4% (docs/data.md).

    dalle-jax encode runs/cifar10_dvae --data cifar10.npz --out cifar10_codes
    dalle-jax train cifar10_dalle --data.path cifar10.npz --data.codes cifar10_codes
    dalle-jax evaluate runs/cifar10_dalle --classifier resnet20_cifar10.npz --guidance-scale 1 2 3
"""

import dataclasses

from dalle_jax.config import ArraysSource, DataConfig, TextConfig
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dalle")

config = dataclasses.replace(
    _demo,
    run="runs/cifar10_dalle",
    image_tokenizer="runs/cifar10_dvae",
    model=dataclasses.replace(_demo.model, text_vocab=320, text_len=8, image_vocab=1024),
    data=DataConfig(source=ArraysSource(), batch_size=_demo.data.batch_size),
    text=TextConfig(num_train_captions=1_000, bpe_dropout=0.0),
    steps=1_500,
    eval_every=500,
    save_every=500,
    sample_every=1_500,
)
