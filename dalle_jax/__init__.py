"""The DALL-E family in JAX.

    import dalle_jax
    from dalle_jax import dalle
    params = dalle.init(cfg, key)
    model = dalle_jax.load("runs/dalle")  # the pipeline of a trained model

Subpackages are imported on first access, so `import dalle_jax` loads neither jax nor NumPy. The modules of
`dalle_jax.models` are also attributes of the package: `dalle_jax.dalle` is `dalle_jax.models.dalle`.
"""

import importlib

_SUBPACKAGES = (
    "config",
    "files",
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

__all__ = list(_SUBPACKAGES)  # `load` and the models are attributes without being listed in the API pages
__version__ = "0.2.0"


def __getattr__(name: str):
    if name in _SUBPACKAGES:
        return importlib.import_module(f"dalle_jax.{name}")
    if name == "load":
        return importlib.import_module("dalle_jax.pipelines").load
    if name in _MODELS:
        return importlib.import_module(f"dalle_jax.models.{name}")
    names = ", ".join(__dir__())
    raise AttributeError(f"Expected one of {names}, got dalle_jax.{name}.")


def __dir__():
    return [*_SUBPACKAGES, *_MODELS, "load"]
