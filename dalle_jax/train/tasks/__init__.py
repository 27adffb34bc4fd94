"""What each stage trains: its parameters, loss, data, measures and pictures, one file per stage.

The loop (train/loop.py) asks a task for these and knows nothing else of it. A stage that is added to the library
is one file here and one line in `make_task`, the only place that tells stages apart.
"""

from __future__ import annotations

from dalle_jax.config import (
    BartConfig,
    ClipConfig,
    DalleConfig,
    DiffusionConfig,
    DVAEConfig,
    TrainConfig,
    VQGANConfig,
)
from dalle_jax.train.tasks.clip import ClipTask
from dalle_jax.train.tasks.dalle import DalleTask
from dalle_jax.train.tasks.diffusion import DiffusionTask
from dalle_jax.train.tasks.tokenizer import TokenizerTask
from dalle_jax.train.tasks.vqgan import VQGANTask


def make_task(
    config: TrainConfig, *, on_codes: bool = False
) -> TokenizerTask | DalleTask | ClipTask | DiffusionTask:
    """The task of the stage that `config.model` names.

    on_codes: of a stage that reads image tokens, no tokenizer is asked for, because its batches hold the codes: its
    step can be compiled before a tokenizer is trained. Raises what the task raises.
    """
    match config.model:
        case DVAEConfig():
            return TokenizerTask(config)
        case VQGANConfig():
            return VQGANTask(config)
        case DalleConfig() | BartConfig():
            return DalleTask(config, on_codes=on_codes)
        case ClipConfig():
            return ClipTask(config)
        case DiffusionConfig():
            return DiffusionTask(config, on_codes=on_codes)
    raise ValueError(f"no stage trains a {type(config.model).__name__}")
