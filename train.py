"""Train a configuration: python train.py CONFIG [--field value ...], the same as `dalle-jax train`."""

import sys

from dalle_jax.cli import main
from dalle_jax.cli.startup import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main(["train", *sys.argv[1:]], prog="train.py"))
