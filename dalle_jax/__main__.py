"""`python -m dalle_jax VERB ...` is `dalle-jax VERB ...`."""

import sys

from dalle_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
