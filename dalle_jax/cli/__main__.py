"""`python -m dalle_jax.cli COMMAND ...`, where the command `dalle-jax` is not on the path."""

import sys

from dalle_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
