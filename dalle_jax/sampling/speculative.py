"""Speculative Jacobi decoding: several image tokens per forward pass, with the noise of each position held fixed.

By the Gumbel-max trick a code is the argmax of logits plus Gumbel noise, and the noise of a position follows from the
row's key. Each pass feeds a window of draft codes, computes the logits after each of them and samples every position
with its own noise. A sampled code is accepted if all drafts before it were right: the first always is, the others as
long as drafts equal samples. Rejected samples are the drafts of the next pass. The image is the one that sequential
decoding samples with the same key, up to the rounding of products of another shape; so are all distributions.

The window is that of speculative Jacobi decoding (Teng et al. 2024, 2410.01699), which samples with fresh noise and
accepts a draft by the ratio of its two probabilities; fixed noise is that of predictive sampling (Wiggers and Hoogeboom
2020, 2002.09928). On the demo both took about the same number of passes (benchmarks/RESULTS.md), and with fixed noise
an image depends on its caption and seed alone.

B rows, N codes, P prefix codes, Q drafts of a row, V image vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.config import TransformerConfig
from dalle_jax.models import autoregressive
from dalle_jax.sampling.logits import sample_codes
from dalle_jax.typing import Params


def check_draft_len(cfg: TransformerConfig, draft_len: int | None) -> None:
    """Raise ValueError for an invalid draft length; None is sequential decoding."""
    if draft_len is not None and not 2 <= draft_len <= cfg.num_codes:
        raise ValueError(
            f"Expected draft_len from 2 to {cfg.num_codes}, got {draft_len}. Use None to decode one code per pass."
        )


def speculative_step(
    cfg: TransformerConfig,
    params: Params,
    cache: autoregressive.Cache,
    codes_BN: jax.Array,
    position_B: jax.Array,
    prefix_len_B: jax.Array,
    draft_len: int,
    sample_fn: Callable[[jax.Array, jax.Array], jax.Array],
    use_cfg: bool = False,
) -> tuple[autoregressive.Cache, jax.Array, jax.Array]:
    """Feed Q codes of each row, accept the right drafts among them and propose new drafts.

    Args:
      cfg: the model.
      params: as `autoregressive.prepare_for_decode` returns them.
      cache: after the codes before `position_B`; with guidance of 2 B rows, the null caption's last.
      codes_BN: int32. Codes up to `position_B` are final, those after it are drafts.
      position_B: int32, the first position to feed.
      prefix_len_B: int32. Codes before this position are given and stay.
      draft_len: Q, static.
      sample_fn: maps logits, float32 (B or 2 B, Q, V), and positions, int32 (B, Q), to codes, int32 (B, Q).
      use_cfg: static; the rows are doubled for guidance.

    Returns:
      The cache, the codes with new drafts, and the number of accepted codes of each row, int32 (B,): 0 of a row that is
      finished.
    """
    last = cfg.num_codes - 1
    position_BQ = position_B[:, None] + jnp.arange(draft_len)[None]
    next_BQ = position_BQ + 1
    fed_BQ, draft_BQ = (
        jnp.take_along_axis(codes_BN, jnp.minimum(index_BQ, last), axis=1)
        for index_BQ in (position_BQ, next_BQ)
    )
    rows_fed, rows_position = (jnp.concatenate([x, x]) if use_cfg else x for x in (fed_BQ, position_B))
    logits, new_kv = autoregressive.decode_drafts(cfg, params, cache, rows_fed, rows_position)
    sampled_BQ = jnp.where(next_BQ < prefix_len_B[:, None], draft_BQ, sample_fn(logits, next_BQ))
    right_BQ = jnp.cumprod(sampled_BQ[:, :-1] == fed_BQ[:, 1:], axis=1)
    num_accepted_B = jnp.minimum(1 + right_BQ.sum(axis=1), last - position_B)
    rows_accepted = jnp.concatenate([num_accepted_B, num_accepted_B]) if use_cfg else num_accepted_B
    cache = autoregressive.commit_drafts(cfg, cache, new_kv, rows_position, rows_accepted)
    codes_BN = codes_BN.at[jnp.arange(len(codes_BN))[:, None], next_BQ].set(sampled_BQ, mode="drop")
    codes_BN = propose_drafts(cfg.grid, codes_BN, position_B + draft_len, prefix_len_B, draft_len)
    return cache, codes_BN, num_accepted_B


class SpeculativeState(NamedTuple):
    """State of `speculative_decode`.

    Attributes:
      cache: after the codes before `position_B`.
      codes_BN: int32. Codes up to `position_B` are final, those after it are drafts.
      position_B: int32, the next position to feed.
      num_passes_B: int32, the forward passes so far.
    """

    cache: autoregressive.Cache
    codes_BN: jax.Array
    position_B: jax.Array
    num_passes_B: jax.Array


def init_speculative(
    cfg: TransformerConfig, cache: autoregressive.Cache, prefix_BP: jax.Array, draft_len: int
) -> SpeculativeState:
    """Return the first state after P >= 1 codes, int32 (B, P), of which the first P - 1 are in the cache."""
    rows, prefix_len = prefix_BP.shape
    codes_BN = jnp.pad(prefix_BP, ((0, 0), (0, cfg.num_codes - prefix_len)), mode="edge")
    position_B = jnp.full(rows, prefix_len - 1)
    codes_BN = propose_drafts(cfg.grid, codes_BN, position_B, jnp.zeros(rows, jnp.int32), draft_len)
    return SpeculativeState(cache, codes_BN, position_B, jnp.zeros(rows, jnp.int32))


def speculative_decode(
    cfg: TransformerConfig,
    params: Params,
    state: SpeculativeState,
    keys_B: jax.Array,
    end: jax.Array | int,
    cache_size: int,
    draft_len: int,
    options: dict[str, Any],
) -> SpeculativeState:
    """Decode until the codes up to position `end` are final in every row; each row advances at its own rate.

    Args:
      cfg: the model.
      params: as `autoregressive.prepare_for_decode` returns them.
      state: of `init_speculative` or of an earlier call.
      keys_B: one key per row.
      end: a position below N.
      cache_size: static, image tokens that the caches of full layers are resized to. Decoding stops before a row
        exceeds it.
      draft_len: Q >= 2, static.
      options: keyword arguments of `sample_codes`.
    """
    last = cfg.num_codes - 1
    repeated = {name: _repeat_rows(value, draft_len) for name, value in options.items() if name != "top_k"}
    repeated["top_k"] = options["top_k"]
    keys_X = jnp.repeat(keys_B, draft_len, axis=0)
    no_prefix_B = jnp.zeros(len(keys_B), jnp.int32)

    def sample_fn(logits, position_BQ):
        sampled_X = sample_codes(
            logits.reshape(-1, logits.shape[-1]), keys_X, position_BQ.ravel(), **repeated
        )
        return sampled_X.reshape(position_BQ.shape)

    def body(state: SpeculativeState) -> SpeculativeState:
        cache, codes_BN, num_accepted_B = speculative_step(
            cfg, params, state.cache, state.codes_BN, state.position_B, no_prefix_B, draft_len, sample_fn,
            use_cfg=options["guidance_scale"] is not None,
        )  # fmt: skip
        num_passes_B = state.num_passes_B + (num_accepted_B > 0)
        return SpeculativeState(cache, codes_BN, state.position_B + num_accepted_B, num_passes_B)

    def unfinished(state: SpeculativeState) -> jax.Array:
        fits = (cache_size > last) | (state.position_B.max() + draft_len <= cache_size)
        return (state.position_B.min() < end) & fits

    state = state._replace(cache=autoregressive.resize_cache(cfg, state.cache, cache_size))
    return jax.lax.while_loop(unfinished, body, state)


def _repeat_rows(value: Any, draft_len: int) -> Any:
    """Repeat an option of each row, (B,), for each of its drafts, (B * Q,); scalars and None stay."""
    return jnp.repeat(value, draft_len, axis=0) if value is not None and jnp.ndim(value) else value


def propose_drafts(
    grid: int, codes_BN: jax.Array, position_B: jax.Array, prefix_len_B: jax.Array, num_drafts: int
) -> jax.Array:
    """Write drafts to the `num_drafts` positions after `position_B`, except to the given codes before `prefix_len_B`.

    The draft of a position is the code above it in the last raster row that is decoded, or the code at `position_B`
    where there is none.
    """
    num_codes = codes_BN.shape[1]
    position_B1 = jnp.minimum(position_B, num_codes - 1)[:, None]
    offset_1Q = jnp.arange(1, num_drafts + 1)[None]
    above_BQ = position_B1 + offset_1Q - grid * -(-offset_1Q // grid)
    draft_BQ = jnp.take_along_axis(codes_BN, jnp.where(above_BQ >= 0, above_BQ, position_B1), axis=1)
    target_BQ = position_B1 + offset_1Q
    target_BQ = jnp.where(target_BQ < prefix_len_B[:, None], num_codes, target_BQ)
    return codes_BN.at[jnp.arange(len(codes_BN))[:, None], target_BQ].set(draft_BQ, mode="drop")
