"""The demo's tokenizer: dVAE on procedural scenes of one large object, 32 x 32 pixels to 8 x 8 codes.

The same configuration that `dalle-jax demo` trains; two CPU cores, minutes.

    python train.py configs/demo_dvae.py
"""

from dalle_jax.cli.demo_run import dvae_config

config = dvae_config()
