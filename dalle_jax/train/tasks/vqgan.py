"""The stage of VQGAN: a tokenizer and a discriminator learn against each other, in one state and one step."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from dalle_jax.config import TrainConfig
from dalle_jax.data.images import to_float
from dalle_jax.models import lpips
from dalle_jax.models.vqgan import adversarial, quantizers
from dalle_jax.train.adversarial_optim import adversarial_optimizer, tokenizer_params
from dalle_jax.train.optim import make_optimizer
from dalle_jax.train.state import TrainState
from dalle_jax.train.tasks.tokenizer import TokenizerTask
from dalle_jax.typing import Params


class VQGANTask(TokenizerTask):
    """Supplies its own gradients: each of the two networks descends another loss."""

    averaged = ("tokenizer",)  # an average of the discriminator would be used by nobody

    def __init__(self, config: TrainConfig, *, on_codes: bool = False):
        super().__init__(config, on_codes=on_codes)
        if self.model.lpips is not None:  # before the run directory is made
            self.frozen = {"lpips": lpips.load_lpips(self.model.lpips)}

    def prepare(self, run_dir: Path) -> None:
        super().prepare(run_dir)
        if not self.frozen and self.model.perceptual_weight and jax.process_index() == 0:
            print(
                "model.lpips is not set: without the weights of LPIPS the perceptual term is the distance of "
                "Laplacian pyramids. It sharpens edges but knows no textures; for photos give an npz with LPIPS "
                "weights (docs/tokenizers.md says of what form)",
                file=sys.stderr,
            )

    def init(self, key: jax.Array) -> Params:
        return adversarial.init(self.model, key)

    def optimizer(self, params: Params) -> optax.GradientTransformation:
        config = self.config
        own = make_optimizer(config.optim, config.steps, tokenizer_params(params))
        return adversarial_optimizer(self.model, own)

    def gradients(self, params, frozen, batch, key, step):
        images = to_float(batch["image"])
        return adversarial.adversarial_gradients(self.model, params, frozen.get("lpips"), images, key, step)

    def post_update(
        self, state: TrainState, left: Params, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Codes that were not used for a while begin anew, in the average too: it would come to them late."""
        cfg, params = self.model.quantizer, state.params["tokenizer"]["quantize"]
        idle, due, vectors = quantizers.restart_dead_codes(
            cfg, params, state.opt_state.idle, left["latents"], left["codes"], key
        )

        def place(parts):
            if "tokenizer" not in parts:  # no average
                return parts
            table = jnp.where(due[:, None], vectors, parts["tokenizer"]["quantize"]["embedding"])
            return {**parts, "tokenizer": {**parts["tokenizer"], "quantize": {"embedding": table}}}

        new = TrainState(
            state.step, place(state.params), state.opt_state._replace(idle=idle), place(state.ema)
        )
        return new, {"codes_restarted": jnp.sum(due)}

    def evaluate(self, params, frozen, batch, key):
        return super().evaluate(params["tokenizer"], frozen, batch, key)

    def sample_grid(self, params, frozen, key):
        return super().sample_grid(params["tokenizer"], frozen, key)
