"""What a command does before its verb: the clock for times that include starting up, and the compilation cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

_BEGUN = time.monotonic()


def start_command() -> None:
    """Starts the clock, and has programs that jax compiles kept for the next command.

    They go to XDG_CACHE_HOME/dalle_jax, by default ~/.cache/dalle_jax, unless jax's own variable
    JAX_COMPILATION_CACHE_DIR says otherwise; JAX_ENABLE_COMPILATION_CACHE=0 turns it off. No effect where jax has
    been imported before, as in a test or a notebook.
    """
    global _BEGUN
    _BEGUN = time.monotonic()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "dalle_jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def seconds_since_start() -> float:
    """Since the command began."""
    return time.monotonic() - _BEGUN
