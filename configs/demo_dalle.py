"""The demo's Transformer: captions in English and Chinese to the codes of configs/demo_dvae.py.

The same configuration that `dalle-jax demo` trains; two CPU cores, minutes, after the tokenizer.

    python train.py configs/demo_dalle.py
"""

from dalle_jax.cli.demo_run import dalle_config

config = dalle_config()
