"""Training stage of the discrete VAE (Ramesh et al. 2021, 2102.12092, sec. 2.1)."""

from __future__ import annotations

import jax

from dalle_jax.config import DVAEConfig, TrainConfig
from dalle_jax.data.images import to_float
from dalle_jax.models import dvae
from dalle_jax.models.tokenizer_losses import schedule_value
from dalle_jax.train.task import MetricDict
from dalle_jax.train.tasks.tokenizer import TokenizerTask
from dalle_jax.typing import Batch, Params


class DVAETask(TokenizerTask):
    """Trains a discrete VAE, with scheduled temperature and loss weights."""

    def __init__(self, config: TrainConfig):
        assert isinstance(config.model, DVAEConfig)
        super().__init__(config, config.model)
        self.model = config.model

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, MetricDict]:
        weights = {
            name: schedule_value(getattr(self.model, name), step)
            for name in ("tau", "kl_weight", "code_usage_weight")
        }
        loss, metrics = dvae.loss(self.model, params, to_float(batch["image"]), key, **weights)
        return loss, {**metrics, **weights}
