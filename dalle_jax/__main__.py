"""`python -m dalle_jax COMMAND ...` is `dalle-jax COMMAND ...`."""

import sys

from dalle_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
