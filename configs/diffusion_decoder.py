"""Diffusion decoder of the demo's codes, 8 x 8 to 32 x 32 pixels, in place of the decoder of demo_dvae.

Paper: Ho et al. 2020, arXiv 2006.11239; codes are embedded, upsampled and concatenated with the noisy image, as low-
resolution images are in 2104.07636.
Hardware: two CPU cores, after demo_dvae. Time: 4.7 minutes. Score: PSNR 29.9 dB; the dVAE's decoder has 28.1 dB
(docs/diffusion.md).

    dalle-jax train diffusion_decoder --image-tokenizer runs/demo/dvae
    dalle-jax evaluate runs/diffusion_decoder
    dalle-jax sample runs/demo/dalle "a large red star" --decoder runs/diffusion_decoder
"""

import dataclasses

from dalle_jax.config import CodesConfig, DiffusionConfig, NoiseConfig, TrainConfig
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dvae")

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
