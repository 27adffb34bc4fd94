"""What a queue holds on the device, and the programs that begin pictures there and draw on (queue.py).

Each slot is a row of the caches and at its own place of its own picture. A guided picture has two, the second on
the null caption; it repeats the codes of the first and so stays beside it, with several codes a pass too.
S slots, A slots filled at once, T text positions, N codes of a picture, Q places at once, V image vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import TransformerConfig
from dalle_jax.models import autoregressive
from dalle_jax.sampling.generate import row_keys
from dalle_jax.sampling.logits import apply_cfg, sample_logits
from dalle_jax.sampling.speculative import propose_drafts, speculative_step
from dalle_jax.typing import Params


class DecodeState(NamedTuple):
    """A slot on the null caption repeats the codes of its `leader`, whose `null` it is."""

    cache: autoregressive.Cache
    codes_SN: jax.Array
    place_S: jax.Array  # of the code that is fed next; N - 1 at the end
    given_S: jax.Array  # codes below this place are not drawn
    passes_S: jax.Array  # of the network that drew codes of the picture
    keys_S: jax.Array
    temperature_S: jax.Array
    top_p_S: jax.Array
    guidance_S: jax.Array
    leader_S: jax.Array
    null_S: jax.Array


def init_decode_state(cfg: TransformerConfig, count: int) -> DecodeState:
    """`count` slots that are free."""
    none = jnp.zeros(count, jnp.int32)
    slots = DecodeState(
        cache=autoregressive.init_cache(cfg, count),
        codes_SN=jnp.zeros((count, cfg.num_codes), jnp.int32),
        place_S=jnp.full(count, cfg.num_codes - 1),
        given_S=none,
        passes_S=none,
        keys_S=row_keys(np.zeros(count)),
        temperature_S=jnp.ones(count),
        top_p_S=jnp.ones(count),
        guidance_S=jnp.ones(count),
        leader_S=jnp.arange(count),
        null_S=jnp.arange(count),
    )
    return jax.tree.map(jnp.copy, slots)  # no array twice: all of them are donated to each program


def _pick(logits_SV, nulls_SV, guided_S, guidance_S, keys_S, place_S, temperature_S, top_p_S, top_k, nucleus):
    """A row without guidance has its own scores, to the last bit."""
    mixed_SV = apply_cfg(logits_SV, nulls_SV, guidance_S)
    logits_SV = jnp.where(guided_S[:, None], mixed_SV, logits_SV)
    keys_S = jax.vmap(jax.random.fold_in)(keys_S, place_S)
    top_p = top_p_S if nucleus else None
    return sample_logits(logits_SV, keys_S, temperature=temperature_S, top_k=top_k, top_p=top_p)


@functools.partial(jax.jit, static_argnames=("cfg", "top_k", "nucleus"), donate_argnames="slots")
def decode_steps(
    cfg: TransformerConfig, params: Params, slots: DecodeState, count, top_k, nucleus: bool
) -> DecodeState:
    """`count` codes of all slots, one a pass; finished and empty ones stay where they are."""
    rows, last = jnp.arange(len(slots.place_S)), cfg.num_codes - 1

    def step(_, slots: DecodeState) -> DecodeState:
        code_S = slots.codes_SN[rows, slots.place_S]
        logits_SV, cache = autoregressive.decode_step(cfg, params, slots.cache, code_S, slots.place_S)
        after_S = jnp.minimum(slots.place_S + 1, last)
        drawn_S = _pick(
            logits_SV, logits_SV[slots.null_S], slots.null_S != rows, slots.guidance_S, slots.keys_S, after_S,
            slots.temperature_S, slots.top_p_S, top_k, nucleus,
        )  # fmt: skip
        there_S = slots.codes_SN[rows, after_S]
        keep_S = (after_S < slots.given_S) | (slots.place_S == last)
        next_S = jnp.where(keep_S, there_S, drawn_S)[slots.leader_S]
        return slots._replace(
            cache=cache,
            codes_SN=slots.codes_SN.at[rows, after_S].set(next_S),
            place_S=after_S,
            passes_S=slots.passes_S + ~keep_S,
        )

    with jax.named_scope("decode"):
        return jax.lax.fori_loop(0, count, step, slots)


@functools.partial(jax.jit, static_argnames=("cfg", "window", "top_k", "nucleus"), donate_argnames="slots")
def speculative_passes(
    cfg: TransformerConfig,
    params: Params,
    slots: DecodeState,
    most,
    enough,
    window: int,
    top_k,
    nucleus: bool,
) -> DecodeState:
    """Passes over Q places of each slot until `enough` slots more are finished, at most `most` passes."""
    rows, last = jnp.arange(len(slots.place_S)), cfg.num_codes - 1
    ended_S = slots.place_S == last

    def each(x_S):
        return jnp.repeat(x_S, window, axis=0)

    def go(state):
        slots, count = state

        def draw_all(logits_SQV, after_SQ):
            own_XV, null_XV = (x.reshape(-1, x.shape[-1]) for x in (logits_SQV, logits_SQV[slots.null_S]))
            drawn_X = _pick(
                own_XV, null_XV, each(slots.null_S != rows), each(slots.guidance_S), each(slots.keys_S),
                after_SQ.ravel(), each(slots.temperature_S), each(slots.top_p_S), top_k, nucleus,
            )  # fmt: skip
            return drawn_X.reshape(after_SQ.shape)[slots.leader_S]

        cache, codes_SN, moved_S = speculative_step(
            cfg, params, slots.cache, slots.codes_SN, slots.place_S, slots.given_S, window, draw_all
        )
        place_S = slots.place_S + moved_S
        drew_S = (moved_S > 0) & (place_S >= slots.given_S)
        slots = slots._replace(
            cache=cache, codes_SN=codes_SN, place_S=place_S, passes_S=slots.passes_S + drew_S
        )
        return slots, count + 1

    def goes_on(state):
        slots, count = state
        return (count < most) & (((slots.place_S == last) & ~ended_S).sum() < enough)

    begun_SN = propose_drafts(cfg.grid, slots.codes_SN, jnp.zeros_like(rows), slots.given_S, window)
    begun_SN = jnp.where((slots.place_S == 0)[:, None], begun_SN, slots.codes_SN)
    with jax.named_scope("decode"):
        return jax.lax.while_loop(goes_on, go, (slots._replace(codes_SN=begun_SN), jnp.int32(0)))[0]


class NewRequests(NamedTuple):
    """Requests for the slots `at_A`, and for their null captions the slots `null_A`; S where there is none."""

    text_AT: jax.Array
    at_A: jax.Array
    null_A: jax.Array
    codes_AN: jax.Array  # the given ones first
    given_A: jax.Array
    keys_A: jax.Array
    temperature_A: jax.Array
    top_p_A: jax.Array
    guidance_A: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "top_k"), donate_argnames="slots")
def prefill_slots(
    cfg: TransformerConfig, params: Params, slots: DecodeState, new: NewRequests, top_k
) -> DecodeState:
    """Runs the captions and begins their pictures; rows for the slot S are dropped."""
    count, none_A = len(slots.place_S), jnp.zeros_like(new.at_A)
    with jax.named_scope("prefill"):
        logits, fresh = autoregressive.prefill(cfg, params, new.text_AT, guided=True)
    own_AV, null_AV = jnp.split(logits, 2)
    guided_A = new.null_A < count
    first_A = _pick(
        own_AV,
        null_AV,
        guided_A,
        new.guidance_A,
        new.keys_A,
        none_A,
        new.temperature_A,
        new.top_p_A,
        top_k,
        True,
    )
    codes_AN = new.codes_AN.at[:, 0].set(jnp.where(new.given_A > 0, new.codes_AN[:, 0], first_A))
    both = jnp.concatenate([new.at_A, new.null_A])

    def put(old, value):
        return old.at[both].set(jnp.concatenate([value, value]), mode="drop")

    keys = jax.random.wrap_key_data(put(jax.random.key_data(slots.keys_S), jax.random.key_data(new.keys_A)))
    return DecodeState(
        cache=autoregressive.insert_into_cache(cfg, slots.cache, fresh, both),
        codes_SN=put(slots.codes_SN, codes_AN),
        place_S=put(slots.place_S, none_A),
        given_S=put(slots.given_S, new.given_A),
        passes_S=put(slots.passes_S, none_A),
        keys_S=keys,
        temperature_S=put(slots.temperature_S, new.temperature_A),
        top_p_S=put(slots.top_p_S, new.top_p_A),
        guidance_S=put(slots.guidance_S, new.guidance_A),
        leader_S=put(slots.leader_S, new.at_A),
        null_S=slots.null_S.at[both].set(
            jnp.concatenate([jnp.where(guided_A, new.null_A, new.at_A), new.null_A]), mode="drop"
        ),
    )
