"""dalle_jax: the DALL-E family in JAX.

Submodules load on first use, so `import dalle_jax` is fast and touches no device:

    import dalle_jax as dj
    params = dj.dalle.init(cfg, jax.random.key(0))
"""

import importlib

_ROOMS = (
    "config",
    "text",
    "nn",
    "tokenizer",
    "dalle",
    "clip",
    "diffusion",
    "sampling",
    "data",
    "train",
    "inference",
    "ranking",
    "evaluate",
    "importers",
    "demo",
    "cli",
)

__all__ = list(_ROOMS)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"dalle_jax.{name}")
    raise AttributeError(f"module 'dalle_jax' has no attribute {name!r}; it has {', '.join(_ROOMS)}")


def __dir__():
    return sorted([*globals(), *_ROOMS])
