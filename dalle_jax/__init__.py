"""The DALL-E family in JAX.

    from dalle_jax import dalle, dvae
    params = dalle.init(cfg, key)

Subpackages and models are imported on first access: `import dalle_jax` itself imports nothing heavy.
"""

import importlib

_ROOMS = (
    "config",
    "typing",
    "text",
    "parallel",
    "nn",
    "models",
    "data",
    "sampling",
    "importers",
    "checkpoint",
    "train",
    "aot",
    "pipelines",
    "evaluate",
    "cli",
)
_MODELS = ("tokenizer", "dvae", "vqgan", "dalle", "bart", "clip", "diffusion")

__all__ = [*_ROOMS, *_MODELS]
__version__ = "0.2.0"


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"dalle_jax.{name}")
    if name in _MODELS:
        return importlib.import_module(f"dalle_jax.models.{name}")
    raise AttributeError(f"module 'dalle_jax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return sorted([*globals(), *__all__])
