"""The one loader of trained models: a run directory to the pipeline of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar, overload

import jax

from dalle_jax.checkpoint.layout import CONFIG_FILE, IMAGE_TOKENIZER_DIR
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.remote_dir import local_dir
from dalle_jax.checkpoint.run_dir import read_run_config
from dalle_jax.config import ModelConfig
from dalle_jax.models.registry import load_registry_class, model_spec
from dalle_jax.pipelines.protocol import Pipeline
from dalle_jax.pipelines.tokenizer import TokenizerPipeline

_P = TypeVar("_P", bound=Pipeline)

_EXPECTED = {
    "tokenizer": "an image tokenizer",
    "text-to-image": "a Transformer from text to images",
    "diffusion": "a diffusion model",
    "clip": "a CLIP, as configs/demo_clip.py trains it",
}


def pipeline_class(model: ModelConfig) -> type[Pipeline]:
    """Return the class of the pipeline that uses a model."""
    return load_registry_class(model_spec(model).pipeline)


def host_device() -> jax.Device:
    """Return the CPU as a device, or the first device where jax does not offer the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


@overload
def load(path: str | Path, *, params_on_host: bool = False) -> Pipeline: ...


@overload
def load(path: str | Path, expected: type[_P], *, params_on_host: bool = False) -> _P: ...


def load(path, expected=None, *, params_on_host=False):
    """Load the pipeline of a run directory.

    Args:
        path: directory that training, `dalle-jax export` or `dalle-jax import` wrote, or the URL of one.
        expected: the class of the pipeline. For TokenizerPipeline the run may be of a model that keeps the tokenizer
            it was trained with; that tokenizer is returned and nothing else is loaded. None takes any run.
        params_on_host: keep the float32 parameters in the memory of the host. A Transformer copies to the device only
            what it prepares from them for sampling.

    Returns:
        The pipeline, its parameters ready for use.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint or file that the pipeline needs.
        ValueError: `expected` is not the class of one kind of pipeline, the run is of another kind, or its checkpoint
            does not fit its configuration.
        OSError: a file cannot be read.
    """
    if expected is not None and getattr(expected, "kind", None) not in _EXPECTED:
        raise ValueError(
            f"Expected None or the class of one kind of pipeline, got {expected!r}. Use e.g. TextToImagePipeline."
        )
    local = local_dir(path)
    config = read_run_config(path)
    found = pipeline_class(config.model)
    if expected is TokenizerPipeline and found.kind != "tokenizer":
        if found.kind == "clip":
            raise ValueError(
                f"Expected a run with an image tokenizer, got {path} of stage clip. Use the run of a tokenizer or a "
                "Transformer."
            )
        if not (local / IMAGE_TOKENIZER_DIR / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"Expected {IMAGE_TOKENIZER_DIR}/ in {path}, got none. Train the run first, or use the tokenizer's own "
                "run."
            )
        return load(local / IMAGE_TOKENIZER_DIR, TokenizerPipeline)
    if expected not in (None, found):
        raise ValueError(
            f"Expected the run of {_EXPECTED[expected.kind]}, got {path} of stage {config.model.kind}."
        )
    return found.from_run(load_run(path, device=host_device() if params_on_host else None))
