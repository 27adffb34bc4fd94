"""Training stages, one file each; models/registry.py names the stage of each model configuration."""

from __future__ import annotations

from dalle_jax.config import TrainConfig
from dalle_jax.models.registry import load_registry_class, model_spec
from dalle_jax.train.task import Task


def make_task(config: TrainConfig) -> Task:
    """Return the stage that trains `config.model`."""
    return load_registry_class(model_spec(config.model).task)(config)
