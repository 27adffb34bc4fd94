"""VQGAN on the demo's scenes, 32 x 32 pixels to 8 x 8 codes of 128; its discriminator starts halfway.

Paper: Esser et al. 2020, arXiv 2012.09841, at a small size.
Hardware: two CPU cores. Time: about four minutes. Score: PSNR 21.4 dB, 37.5% of the codes in use
(docs/tokenizers.md).

    dalle-jax train demo_vqgan
"""

import dataclasses

from dalle_jax.config import AdversarialConfig, TrainConfig, VectorQuantizer, VQGANConfig
from dalle_jax.config.files import load_shipped_config

_demo = load_shipped_config("demo_dvae")
STEPS = 1_500

config = TrainConfig(
    run="runs/demo_vqgan",
    model=VQGANConfig(
        image_size=32,
        width=16,
        channel_multipliers=(1, 2, 2),
        blocks=1,
        attention_levels=(2,),
        latent_width=32,
        quantizer=VectorQuantizer(vocab=128, dim=8, normalize=True),
        adversarial=AdversarialConfig(
            disc_start_step=STEPS // 2, disc_warmup_steps=STEPS // 6, width=16, layers=2, learning_rate=2e-4
        ),
    ),
    data=_demo.data,
    optim=dataclasses.replace(_demo.optim, learning_rate=2e-3),
    mesh=_demo.mesh,
    steps=STEPS,
    log_every=10,
    eval_every=STEPS // 10,
    save_every=STEPS // 2,
    sample_every=STEPS // 2,
)
