"""Training tasks, one file per stage: parameters, loss, data, measures and sample grids.

The training loop (train/loop.py) uses a task through these alone. models/registry.py names the task of each model.
"""

from __future__ import annotations

from typing import Any

from dalle_jax.config import TrainConfig
from dalle_jax.models.registry import load_class, model_spec


def make_task(config: TrainConfig, *, on_codes: bool = False) -> Any:
    """Make the training task of `config.model`.

    Args:
      config: the training run.
      on_codes: batches hold image tokens instead of images, so no image tokenizer is needed. The training step can
        then be compiled before a tokenizer is trained.

    Raises:
      ValueError: there is no task for this model, or what the task raises.
    """
    return load_class(model_spec(config.model).task)(config, on_codes=on_codes)
