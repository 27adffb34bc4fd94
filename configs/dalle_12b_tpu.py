"""The paper's Transformer in sizes that a TPU likes: 60 layers, width 4096, 64 heads, 12 billion parameters.

Paper: Ramesh et al. 2021, arXiv 2102.12092; there 64 layers, width 3968, 62 heads (configs/dalle_12b.py). 3968 is
128 x 31: it does not divide over 256 chips, and 62 heads not over more than 2. Everything else is as there.
Not trained here; `--compile-only v5p:4x4x4` compiles it for a TPU without one.

    python train.py configs/dalle_12b_tpu.py --image-tokenizer runs/dvae_openai --data.source.path "shards/*.tar"
"""

import dataclasses

from dalle_jax.config.files import load_config

_paper = load_config("dalle_12b")
config = dataclasses.replace(
    _paper,
    run="runs/dalle_12b_tpu",
    model=dataclasses.replace(_paper.model, layers=60, dim=4096, heads=64),
)
