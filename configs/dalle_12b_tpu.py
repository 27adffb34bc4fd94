"""Transformer of the paper in sizes that divide over TPU pods: 60 layers, width 4096, 64 heads, 12 billion parameters.

Paper: Ramesh et al. 2021, arXiv 2102.12092; there 64 layers, width 3968, 62 heads (dalle_12b). 3968 is 128 x 31,
which does not divide over 256 chips, and 62 heads do not divide over more than 2. All else is equal.
Hardware: a TPU pod. Time: not trained. Score: estimated mfu 62.3% on 64 v5p (docs/scale.md).

    dalle-jax train dalle_12b_tpu --image-tokenizer runs/dvae_openai --data.source.path "shards/*.tar"
    dalle-jax train dalle_12b_tpu --compile-only v5p:4x4x4
"""

import dataclasses

from dalle_jax.config.files import load_shipped_config

_paper = load_shipped_config("dalle_12b")
config = dataclasses.replace(
    _paper,
    run="runs/dalle_12b_tpu",
    model=dataclasses.replace(_paper.model, layers=60, dim=4096, heads=64),
)
