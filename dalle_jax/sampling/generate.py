"""Codes from captions in one jitted program: a prefill, then one scan over the places that are left.

B batch, T text positions, N codes, P codes given in advance, V image vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax import dalle
from dalle_jax.config import DalleConfig
from dalle_jax.sampling.filters import draw, guide

Params = dict[str, Any]


def row_keys(seeds) -> jax.Array:
    """One key per row from integer seeds (B,): a row's picture follows from its caption and seed alone."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


@functools.partial(jax.jit, static_argnames=("cfg", "top_k"))
def generate(
    cfg: DalleConfig,
    params: Params,
    text_BT: jax.Array,
    keys_B: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: jax.Array | float | None = None,
    guidance: jax.Array | float | None = None,
    prime_BP: jax.Array | None = None,
) -> jax.Array:
    """Draw the codes of one picture per row.

    text_BT: int32 (B, T); the null caption (`dalle.null_text`) samples without a caption.
    keys_B: one key per row (`row_keys`). temperature: 0 is greedy. top_k: static, None keeps all codes.
    top_p: share in (0, 1], None keeps all. guidance: scale of classifier-free guidance, computed with the
    null caption in a doubled batch; None samples the conditional model in a single batch. prime_BP: int32,
    the first P < N codes of every picture. Temperature, top_p and guidance are traced: another value does
    not compile again.
    Returns int32 (B, N), the given codes included. Raises ValueError for wrong shapes or P >= N.
    """
    if keys_B.shape != (len(text_BT),):
        raise ValueError(
            f"keys have shape {keys_B.shape}, want one per row: ({len(text_BT)},); use row_keys(seeds)"
        )
    if prime_BP is None:
        prime_BP = jnp.zeros((len(text_BT), 0), jnp.int32)
    dalle.check_ids(cfg, text_BT, prime_BP)
    params = dalle.unstack(cfg, params)
    given = prime_BP.shape[1]
    guided = guidance is not None
    batch = len(text_BT)
    if guided:
        text_BT = jnp.concatenate([text_BT, jnp.broadcast_to(dalle.null_text(cfg), text_BT.shape)])
        prime_BP = jnp.concatenate([prime_BP, prime_BP])

    def pick(logits, place):
        if guided:
            logits = guide(logits[:batch], logits[batch:], guidance)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, place)
        return draw(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p)

    with jax.named_scope("prefill"):
        logits, cache = dalle.prefill(cfg, params, text_BT, prime_BP)
        code_B = pick(logits, given)

    def step(carry, place):
        code_B, cache = carry
        fed = jnp.concatenate([code_B, code_B]) if guided else code_B
        logits, cache = dalle.decode_step(cfg, params, cache, fed, place)
        next_B = pick(logits, place + 1)
        return (next_B, cache), next_B

    with jax.named_scope("decode"):
        _, rest = jax.lax.scan(step, (code_B, cache), jnp.arange(given, cfg.num_codes - 1))
    return jnp.concatenate([prime_BP[:batch], code_B[:, None], rest.T], axis=1).astype(jnp.int32)
