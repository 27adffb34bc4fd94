"""Training stage of VQGAN: a tokenizer and a discriminator with a loss each, in one state and one step."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from PIL import Image

from dalle_jax.config import TrainConfig, VectorQuantizer, VQGANConfig
from dalle_jax.data.images import to_float
from dalle_jax.models import lpips
from dalle_jax.models.vqgan import adversarial, quantizers
from dalle_jax.train.adversarial_optim import adversarial_optimizer, mask_discriminator_params
from dalle_jax.train.state import TrainState
from dalle_jax.train.task import MetricDict
from dalle_jax.train.tasks.tokenizer import TokenizerTask
from dalle_jax.typing import Batch, Params


class VQGANTask(TokenizerTask):
    """Trains a VQGAN: gradients of two losses, and restarts of unused codes after the update."""

    ema_parts = ("tokenizer",)  # nothing uses an averaged discriminator
    single_loss = False

    def __init__(self, config: TrainConfig):
        assert isinstance(config.model, VQGANConfig)
        super().__init__(config, config.model)
        self.model = config.model
        if self.model.lpips is not None:
            self.frozen = {"lpips": lpips.load_lpips(self.model.lpips)}

    def prepare(self, run_dir: Path) -> None:
        super().prepare(run_dir)
        if not self.frozen and self.model.perceptual_weight and jax.process_index() == 0:
            print(
                "model.lpips is not set: the perceptual term is the distance of Laplacian pyramids, which "
                "sharpens edges and "
                "ignores textures. For photos, use an npz file with the LPIPS weights (docs/tokenizers.md).",
                file=sys.stderr,
            )

    def init(self, key: jax.Array) -> Params:
        return adversarial.init(self.model, key)

    def optimizer(self, params: Params) -> optax.GradientTransformation:
        tokenizer_tx = super().optimizer(mask_discriminator_params(params))
        return adversarial_optimizer(self.model, tokenizer_tx)

    def gradients(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[Params, MetricDict, dict[str, jax.Array]]:
        images_BHWC = to_float(batch["image"])
        return adversarial.adversarial_gradients(
            self.model, params, frozen.get("lpips"), images_BHWC, key, step
        )

    def post_update(
        self, state: TrainState, aux: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, MetricDict]:
        """Restart unused codes, in the averages, too, which would follow only slowly."""
        quantizer = self.model.quantizer
        assert isinstance(
            quantizer, VectorQuantizer
        )  # the only one with restarts, so the only one with `aux`
        idle, due_V, vectors_VC = quantizers.restart_dead_codes(
            quantizer,
            state.params["tokenizer"]["quantize"],
            state.opt_state.idle,
            aux["latents"],
            aux["codes"],
            key,
        )

        def restart(params: Params) -> Params:
            if "tokenizer" not in params:  # averaging is off
                return params
            codebook = params["tokenizer"]["quantize"]["embedding"]
            codebook = jnp.where(due_V[:, None], vectors_VC, codebook)
            return {**params, "tokenizer": {**params["tokenizer"], "quantize": {"embedding": codebook}}}

        opt_state = state.opt_state._replace(idle=idle)
        new = TrainState(state.step, restart(state.params), opt_state, restart(state.ema))
        return new, {"codes_restarted": jnp.sum(due_V)}

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> MetricDict:
        return super().evaluate(params["tokenizer"], frozen, batch, key)

    def sample_grid(self, params: Params, frozen: Params, key: jax.Array) -> Image.Image:
        return super().sample_grid(params["tokenizer"], frozen, key)
