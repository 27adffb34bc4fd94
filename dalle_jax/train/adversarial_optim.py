"""The optimizer of VQGAN training: one transformation for the tokenizer, Adam for the discriminator. V codebook."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dalle_jax.config import AdversarialConfig, VQGANConfig
from dalle_jax.typing import Params


class AdversarialState(NamedTuple):
    """The state of the optimizers, and int32 (V,), the steps since each code was used
    (`quantizers.restart_dead_codes`)."""

    networks: Any
    idle: jax.Array


def adversarial_optimizer(
    cfg: VQGANConfig, tokenizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Combine `tokenizer`, for the tokenizer, with Adam for the discriminator, which is idle until it starts.

    Its moments are idle too: Adam would count the steps before the start, and its first steps afterwards would be too
    long. Where dead codes are restarted, the state is an `AdversarialState`, whose count `update` leaves unchanged.
    """
    tx = tokenizer if cfg.adversarial is None else _with_discriminator(cfg.adversarial, tokenizer)
    if not cfg.restarts_dead_codes:
        return tx

    def init(params):
        return AdversarialState(tx.init(params), jnp.zeros(cfg.vocab, jnp.int32))

    def update(updates, state, params=None):
        updates, networks = tx.update(updates, state.networks, params)
        return updates, state._replace(networks=networks)

    return optax.GradientTransformation(init, update)


def _with_discriminator(
    cfg: AdversarialConfig, tokenizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    adam = optax.adam(cfg.learning_rate, b1=cfg.b1, b2=cfg.b2)
    delayed = optax.conditionally_mask(adam, lambda step, **_: step >= cfg.disc_start_step)
    by_part: dict[Hashable, optax.GradientTransformation] = {"tokenizer": tokenizer, "discriminator": delayed}
    return optax.transforms.partition(by_part, {name: name for name in by_part})


def mask_discriminator_params(params: Params) -> Params:
    """Mask every part of `params` but the tokenizer's, for the tokenizer's own optimizer."""
    return {name: part if name == "tokenizer" else optax.MaskedNode() for name, part in params.items()}
