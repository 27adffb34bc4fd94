"""Train a configuration: python train.py CONFIG [--field value ...], the same as `dalle-jax train`."""

import sys

from dalle_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], prog="train.py"))
