"""The demo's 8 x 8 codes to 32 x 32 pixels by diffusion: another decoder for the tokens that the Transformer draws.

Image tokens are embedded, scaled up and put beside the noised picture (as low pictures are in 2104.07636). Hardware:
two CPU cores, minutes, after configs/demo_dvae.py. Time and score: docs/diffusion.md.

    python train.py configs/diffusion_decoder.py --image-tokenizer runs/demo/dvae
    dalle-jax evaluate runs/diffusion_decoder
    dalle-jax sample runs/demo/dalle "a large red star" --decoder runs/diffusion_decoder
"""

import dataclasses

from dalle_jax.config import CodesConfig, DiffusionConfig, NoiseConfig, TrainConfig
from dalle_jax.config.files import load_config

_demo = load_config("demo_dvae")

config = TrainConfig(
    run="runs/diffusion_decoder",
    image_tokenizer=_demo.run,
    model=DiffusionConfig(
        image_size=32,
        patch_size=2,
        width=32,
        channel_multipliers=(1, 2),
        blocks=1,
        attention_sizes=(),
        dropout=0.0,
        codes=CodesConfig(vocab=_demo.model.vocab, grid=_demo.model.grid, width=32),
        noise=NoiseConfig(kind="cosine"),
        prediction="x0",
    ),
    data=_demo.data,
    optim=dataclasses.replace(
        _demo.optim, learning_rate=2e-3, weight_decay=0.0, clip_norm=1.0, ema_decay=0.995, ema_every=1
    ),
    mesh=_demo.mesh,
    steps=1_500,
    log_every=25,
    eval_every=500,
    save_every=250,
    sample_every=500,
    eval_rows=128,
)
