"""Device state of continuous batching (continuous_batcher.py), and the jitted programs that prefill and decode slots.

Each slot is a row of the KV caches with an image and a position of its own. A request with guidance has two slots, one
on the caption and one on the null caption. The null slot repeats the codes of the conditional slot, so that both stay
at the same position, with several codes per pass too.
S slots, A slots prefilled at once, T text positions, N codes, Q drafts, V image vocabulary.
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
    """State of all slots.

    Attributes:
      cache: KV caches of S rows.
      codes_SN: int32, the codes of each image; those after `position_S` are not final.
      position_S: int32, the position that is fed next; N - 1 when the image is finished or the slot is free.
      prefix_len_S: int32. Codes before this position are given.
      num_passes_S: int32, forward passes that sampled codes of the image.
      keys_S: one key per slot.
      temperature_S: float32.
      top_p_S: float32.
      guidance_scale_S: float32.
      cond_slot_S: int32, the conditional slot whose codes this slot has; of a conditional slot itself.
      null_slot_S: int32, the slot on the null caption; without guidance the slot itself.
    """

    cache: autoregressive.Cache
    codes_SN: jax.Array
    position_S: jax.Array
    prefix_len_S: jax.Array
    num_passes_S: jax.Array
    keys_S: jax.Array
    temperature_S: jax.Array
    top_p_S: jax.Array
    guidance_scale_S: jax.Array
    cond_slot_S: jax.Array
    null_slot_S: jax.Array


def init_decode_state(cfg: TransformerConfig, num_slots: int) -> DecodeState:
    """Return the state of `num_slots` free slots."""
    zeros = jnp.zeros(num_slots, jnp.int32)
    state = DecodeState(
        cache=autoregressive.init_cache(cfg, num_slots),
        codes_SN=jnp.zeros((num_slots, cfg.num_codes), jnp.int32),
        position_S=jnp.full(num_slots, cfg.num_codes - 1),
        prefix_len_S=zeros,
        num_passes_S=zeros,
        keys_S=row_keys(np.zeros(num_slots)),
        temperature_S=jnp.ones(num_slots),
        top_p_S=jnp.ones(num_slots),
        guidance_scale_S=jnp.ones(num_slots),
        cond_slot_S=jnp.arange(num_slots),
        null_slot_S=jnp.arange(num_slots),
    )
    return jax.tree.map(
        jnp.copy, state
    )  # every array has a buffer of its own: each program donates all of them


def _sample(
    logits_XV: jax.Array,
    null_logits_XV: jax.Array,
    use_cfg_X: jax.Array,
    guidance_scale_X: jax.Array,
    keys_X: jax.Array,
    position_X: jax.Array,
    temperature_X: jax.Array,
    top_p_X: jax.Array,
    top_k: int | None,
    use_top_p: bool,
) -> jax.Array:
    """Sample int32 (X,). A row without guidance has the logits of the model to the last bit."""
    guided_XV = apply_cfg(logits_XV, null_logits_XV, guidance_scale_X)
    logits_XV = jnp.where(use_cfg_X[:, None], guided_XV, logits_XV)
    keys_X = jax.vmap(jax.random.fold_in)(keys_X, position_X)
    top_p = top_p_X if use_top_p else None
    return sample_logits(logits_XV, keys_X, temperature=temperature_X, top_k=top_k, top_p=top_p)


@functools.partial(jax.jit, static_argnames=("cfg", "top_k", "use_top_p"), donate_argnames="state")
def decode_slots(
    cfg: TransformerConfig,
    params: Params,
    state: DecodeState,
    num_steps: jax.Array,
    top_k: int | None,
    use_top_p: bool,
) -> DecodeState:
    """Decode `num_steps` codes of all slots, one per forward pass; finished and free slots stay unchanged.

    Args:
      cfg: the model; static.
      params: as `autoregressive.prepare_for_decode` returns them.
      state: donated.
      num_steps: int32 scalar.
      top_k: of all slots; static, None keeps every code.
      use_top_p: static; whether to apply `state.top_p_S`.
    """
    rows, last = jnp.arange(len(state.position_S)), cfg.num_codes - 1

    def step(_, state: DecodeState) -> DecodeState:
        code_S = state.codes_SN[rows, state.position_S]
        logits_SV, cache = autoregressive.decode_step(cfg, params, state.cache, code_S, state.position_S)
        next_S = jnp.minimum(state.position_S + 1, last)
        sampled_S = _sample(
            logits_SV, logits_SV[state.null_slot_S], state.null_slot_S != rows, state.guidance_scale_S, state.keys_S,
            next_S, state.temperature_S, state.top_p_S, top_k, use_top_p,
        )  # fmt: skip
        unchanged_S = (next_S < state.prefix_len_S) | (state.position_S == last)
        code_S = jnp.where(unchanged_S, state.codes_SN[rows, next_S], sampled_S)[state.cond_slot_S]
        return state._replace(
            cache=cache,
            codes_SN=state.codes_SN.at[rows, next_S].set(code_S),
            position_S=next_S,
            num_passes_S=state.num_passes_S + ~unchanged_S,
        )

    with jax.named_scope("decode"):
        return jax.lax.fori_loop(0, num_steps, step, state)


@functools.partial(
    jax.jit, static_argnames=("cfg", "draft_len", "top_k", "use_top_p"), donate_argnames="state"
)
def decode_slots_speculatively(
    cfg: TransformerConfig,
    params: Params,
    state: DecodeState,
    max_passes: jax.Array,
    min_finished: jax.Array,
    draft_len: int,
    top_k: int | None,
    use_top_p: bool,
) -> DecodeState:
    """Run forward passes over Q codes of each slot until `min_finished` more slots are finished.

    Args:
      cfg: the model; static.
      params: as `autoregressive.prepare_for_decode` returns them.
      state: donated.
      max_passes: int32 scalar.
      min_finished: int32 scalar.
      draft_len: Q, static.
      top_k: as for `decode_steps`.
      use_top_p: as for `decode_steps`.
    """
    rows, last = jnp.arange(len(state.position_S)), cfg.num_codes - 1
    was_finished_S = state.position_S == last

    def repeat(x_S):
        return jnp.repeat(x_S, draft_len, axis=0)

    def body(carry):
        state, num_passes = carry

        def sample_fn(logits_SQV, position_SQ):
            null_logits_SQV = logits_SQV[state.null_slot_S]
            logits_XV, null_logits_XV = (x.reshape(-1, x.shape[-1]) for x in (logits_SQV, null_logits_SQV))
            sampled_X = _sample(
                logits_XV, null_logits_XV, repeat(state.null_slot_S != rows), repeat(state.guidance_scale_S),
                repeat(state.keys_S), position_SQ.ravel(), repeat(state.temperature_S), repeat(state.top_p_S), top_k,
                use_top_p,
            )  # fmt: skip
            return sampled_X.reshape(position_SQ.shape)[state.cond_slot_S]

        cache, codes_SN, num_accepted_S = speculative_step(
            cfg,
            params,
            state.cache,
            state.codes_SN,
            state.position_S,
            state.prefix_len_S,
            draft_len,
            sample_fn,
        )
        position_S = state.position_S + num_accepted_S
        sampled_S = (num_accepted_S > 0) & (position_S >= state.prefix_len_S)
        state = state._replace(
            cache=cache,
            codes_SN=codes_SN,
            position_S=position_S,
            num_passes_S=state.num_passes_S + sampled_S,
        )
        return state, num_passes + 1

    def unfinished(carry):
        state, num_passes = carry
        num_finished = ((state.position_S == last) & ~was_finished_S).sum()
        return (num_passes < max_passes) & (num_finished < min_finished)

    drafts_SN = propose_drafts(cfg.grid, state.codes_SN, jnp.zeros_like(rows), state.prefix_len_S, draft_len)
    codes_SN = jnp.where((state.position_S == 0)[:, None], drafts_SN, state.codes_SN)
    with jax.named_scope("decode"):
        carry = state._replace(codes_SN=codes_SN), jnp.int32(0)
        return jax.lax.while_loop(unfinished, body, carry)[0]


class NewRequests(NamedTuple):
    """Requests to put into slots.

    Attributes:
      text_AT: int32, the captions.
      slot_A: int32, the slot of each request; S for padding, which is dropped.
      null_slot_A: int32, its slot on the null caption; S without guidance.
      prefix_codes_AN: int32, the given codes, padded.
      prefix_len_A: int32, how many codes are given.
      keys_A: one key per request.
      temperature_A: float32.
      top_p_A: float32.
      guidance_scale_A: float32.
    """

    text_AT: jax.Array
    slot_A: jax.Array
    null_slot_A: jax.Array
    prefix_codes_AN: jax.Array
    prefix_len_A: jax.Array
    keys_A: jax.Array
    temperature_A: jax.Array
    top_p_A: jax.Array
    guidance_scale_A: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "top_k"), donate_argnames="state")
def prefill_slots(
    cfg: TransformerConfig, params: Params, state: DecodeState, new: NewRequests, top_k: int | None
) -> DecodeState:
    """Prefill the captions of new requests, sample their first codes and insert them into their slots.

    Args:
      cfg: the model; static.
      params: as `autoregressive.prepare_for_decode` returns them.
      state: donated.
      new: requests; those for slot S are dropped.
      top_k: as for `decode_steps`.
    """
    num_slots, zero_A = len(state.position_S), jnp.zeros_like(new.slot_A)
    with jax.named_scope("prefill"):
        logits, new_cache = autoregressive.prefill(cfg, params, new.text_AT, use_cfg=True)
    cond_AV, null_AV = jnp.split(logits, 2)
    use_cfg_A = new.null_slot_A < num_slots
    first_A = _sample(
        cond_AV, null_AV, use_cfg_A, new.guidance_scale_A, new.keys_A, zero_A, new.temperature_A, new.top_p_A, top_k,
        use_top_p=True,
    )  # fmt: skip
    first_A = jnp.where(new.prefix_len_A > 0, new.prefix_codes_AN[:, 0], first_A)
    slots_X = jnp.concatenate([new.slot_A, new.null_slot_A])

    def insert(old, value):
        return old.at[slots_X].set(jnp.concatenate([value, value]), mode="drop")

    key_data = insert(jax.random.key_data(state.keys_S), jax.random.key_data(new.keys_A))
    null_slots_X = jnp.concatenate([jnp.where(use_cfg_A, new.null_slot_A, new.slot_A), new.null_slot_A])
    return DecodeState(
        cache=autoregressive.insert_into_cache(cfg, state.cache, new_cache, slots_X),
        codes_SN=insert(state.codes_SN, new.prefix_codes_AN.at[:, 0].set(first_A)),
        position_S=insert(state.position_S, zero_A),
        prefix_len_S=insert(state.prefix_len_S, new.prefix_len_A),
        num_passes_S=insert(state.num_passes_S, zero_A),
        keys_S=jax.random.wrap_key_data(key_data),
        temperature_S=insert(state.temperature_S, new.temperature_A),
        top_p_S=insert(state.top_p_S, new.top_p_A),
        guidance_scale_S=insert(state.guidance_scale_S, new.guidance_scale_A),
        cond_slot_S=insert(state.cond_slot_S, new.slot_A),
        null_slot_S=state.null_slot_S.at[slots_X].set(null_slots_X, mode="drop"),
    )
