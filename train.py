"""Trains a configuration: python train.py configs/X.py [--field value ...]. See dalle_jax/cli/train.py."""

import sys

from dalle_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
