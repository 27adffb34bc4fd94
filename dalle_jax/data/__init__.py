"""Images and captions: sources of rows, decoding, the input pipeline, codes encoded ahead.

Submodules load on first use: `dalle_jax.data.scenes.generator` needs NumPy alone, `dalle_jax.data.loader` imports
  grain.
"""

import importlib
from types import ModuleType

_SUBMODULES = ("codes", "duplicates", "images", "loader", "scenes", "sources", "tfds_builder")

__all__ = list(_SUBMODULES)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"dalle_jax.data.{name}")
    raise AttributeError(
        f"module 'dalle_jax.data' has no attribute {name!r}; it has {', '.join(_SUBMODULES)}"
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
