"""Start of a command: the clock for times that include start-up, and the compilation cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

_start = time.monotonic()


def start_command() -> None:
    """Start the clock and set the compilation cache of jax, which later commands read.

    The cache is in XDG_CACHE_HOME/dalle_jax, by default ~/.cache/dalle_jax; jax's own variables override it
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=0). No effect if jax is already imported, as in a test or
    a notebook.
    """
    global _start
    _start = time.monotonic()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "dalle_jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def seconds_since_start() -> float:
    """Return the seconds since the command started."""
    return time.monotonic() - _start
