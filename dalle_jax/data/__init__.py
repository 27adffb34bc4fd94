"""Pictures and captions: sources of rows, decoding, the input pipeline, codes encoded ahead.

Submodules load on first use: `dalle_jax.data.scenes.generator` needs NumPy alone, `loader` imports grain.
"""

import importlib

_ROOMS = ("codes", "duplicates", "images", "loader", "scenes", "sources", "tfds_builder")

__all__ = list(_ROOMS)


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"dalle_jax.data.{name}")
    raise AttributeError(f"module 'dalle_jax.data' has no attribute {name!r}; it has {', '.join(_ROOMS)}")


def __dir__():
    return sorted([*globals(), *_ROOMS])
