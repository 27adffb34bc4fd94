"""Trains a configuration: python train.py configs/X.py [--field value ...]. See dalle_jax/train/command.py."""

import sys

from dalle_jax.train.command import main

if __name__ == "__main__":
    sys.exit(main())
