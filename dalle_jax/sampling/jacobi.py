"""Several codes per pass of the network: Jacobi iteration with the noise of every place held fixed.

A code is the highest of scores plus Gumbel noise, and a place has noise of its own, from the row's key. Codes of
a window of places are guessed, one pass gives the scores of all of them, and each is drawn anew with its own noise.
A draw is right if every guess before it was, so that the first draw is, and those after it as far as guesses equal
draws; the others are the next guesses. The picture is the one that is drawn code by code with the same key, up to the
rounding of products of another shape, and so are all distributions.
Passes are saved as in speculative Jacobi decoding (Teng et al. 2024, 2410.01699), which draws with fresh noise and
takes or leaves a guess by the ratio of its two probabilities; fixed noise is from predictive sampling (Wiggers and
Hoogeboom 2020, 2002.09928). On the demo both took about the same number of passes (benchmarks/RESULTS.md), and fixed
noise keeps the law that a picture follows from its caption and seed alone.
B rows, N codes, P codes known, Q places at once, V image vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax import autoregressive
from dalle_jax.config import TransformerConfig
from dalle_jax.sampling.filters import pick


def draw_ahead(
    cfg: TransformerConfig,
    params: dict[str, Any],
    cache: autoregressive.Cache,
    known_BP: jax.Array,
    keys_B: jax.Array,
    window: int,
    limits: list[int],
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """The codes after the first P, each row as fast as its guesses are right.

    cache: after P - 1 codes. window: Q >= 2. limits: room of full layers for image tokens, growing, the last N (or
    empty where P is N); the next is taken when a row could go beyond. options: of `pick`.
    Returns int32 (B, N), and int32 (B,), the passes of each row.
    """
    rows, known = known_BP.shape
    last = cfg.num_codes - 1
    codes_BN = jnp.pad(known_BP, ((0, 0), (0, cfg.num_codes - known)), mode="edge")
    guided = options["guidance"] is not None
    each = {name: _each_place(value, window) for name, value in options.items() if name != "top_k"}
    each["top_k"] = options["top_k"]
    keys_X = jnp.repeat(keys_B, window, axis=0)
    ahead_1Q = jnp.arange(window)[None]

    def one_pass(state):
        cache, codes_BN, place_B, passes_B = state
        places_BQ = place_B[:, None] + ahead_1Q
        fed_BQ = jnp.take_along_axis(codes_BN, jnp.minimum(places_BQ, last), axis=1)
        both, at = (jnp.concatenate([x, x]) if guided else x for x in (fed_BQ, place_B))
        logits, fresh = autoregressive.decode_drafts(cfg, params, cache, both, at)
        after_BQ = places_BQ + 1
        drawn_X = pick(logits.reshape(-1, logits.shape[-1]), keys_X, after_BQ.ravel(), **each)
        drawn_BQ = drawn_X.reshape(rows, window)
        right_BQ = jnp.cumprod(drawn_BQ[:, :-1] == fed_BQ[:, 1:], axis=1)
        count_B = jnp.minimum(1 + right_BQ.sum(axis=1), last - place_B)  # 0 for a row that is finished
        kept = jnp.concatenate([count_B, count_B]) if guided else count_B
        cache = autoregressive.keep_drafts(cfg, cache, fresh, at, kept)
        codes_BN = codes_BN.at[jnp.arange(rows)[:, None], after_BQ].set(drawn_BQ, mode="drop")
        codes_BN = _guess(cfg.grid, codes_BN, place_B + window, window)
        return cache, codes_BN, place_B + count_B, passes_B + (count_B > 0)

    place_B, passes_B = jnp.full(rows, known - 1), jnp.zeros(rows, jnp.int32)
    codes_BN = _guess(cfg.grid, codes_BN, place_B, window)
    state = cache, codes_BN, place_B, passes_B
    for limit in limits:
        state = (autoregressive.resize_cache(cfg, state[0], limit), *state[1:])

        def goes_on(state, limit=limit):
            place_B = state[2]
            room = (limit > last) | (place_B.max() + window <= limit)
            return (place_B < last).any() & room

        state = jax.lax.while_loop(goes_on, one_pass, state)
    return state[1], state[3]


def _each_place(value: Any, window: int) -> Any:
    """A setting of each row as one of each place of its window."""
    return jnp.repeat(value, window, axis=0) if value is not None and jnp.ndim(value) else value


def _guess(grid: int, codes_BN: jax.Array, top_B: jax.Array, count: int) -> jax.Array:
    """First guesses for the `count` places after `top_B`: the code above, in the last row there is; else the one at
    `top_B`."""
    top_B1 = jnp.minimum(top_B, codes_BN.shape[1] - 1)[:, None]
    ahead_1Q = jnp.arange(1, count + 1)[None]
    above_BQ = top_B1 + ahead_1Q - grid * -(-ahead_1Q // grid)
    guess_BQ = jnp.take_along_axis(codes_BN, jnp.where(above_BQ >= 0, above_BQ, top_B1), axis=1)
    return codes_BN.at[jnp.arange(len(codes_BN))[:, None], top_B1 + ahead_1Q].set(guess_BQ, mode="drop")
