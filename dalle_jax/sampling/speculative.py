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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.config import TransformerConfig
from dalle_jax.models import autoregressive
from dalle_jax.sampling.logits import sample_codes
from dalle_jax.typing import Params


def check_draft_len(cfg: TransformerConfig, window: int | None) -> None:
    """Raises ValueError for a number of places that cannot be looked at together; None is one code a pass."""
    if window is not None and not 2 <= window <= cfg.num_codes:
        raise ValueError(f"jacobi is {window}; want 2 to {cfg.num_codes} codes at once, or None for one")


def speculative_step(
    cfg: TransformerConfig,
    params: Params,
    cache: autoregressive.Cache,
    codes_BN: jax.Array,
    place_B: jax.Array,
    given_B: jax.Array,
    window: int,
    draw: Callable[[jax.Array, jax.Array], jax.Array],
    guided: bool = False,
) -> tuple[autoregressive.Cache, jax.Array, jax.Array]:
    """Looks at Q places of each row, from `place_B` on; codes up to there are known, those after it guesses.

    given_B: codes below this place are not drawn. draw: the codes, int32 (B, Q), of the raster places int32 (B, Q) by
    their scores, float32 (B, Q, V). guided: the cache and the scores have 2 B rows, the second half for the null
    caption. Returns the cache, the codes with new guesses among them, and how many more are known of each row, int32
    (B,): 0 of one that is finished.
    """
    last = cfg.num_codes - 1
    places_BQ = place_B[:, None] + jnp.arange(window)[None]
    after_BQ = places_BQ + 1
    fed_BQ, there_BQ = (
        jnp.take_along_axis(codes_BN, jnp.minimum(at, last), axis=1) for at in (places_BQ, after_BQ)
    )
    both, at = (jnp.concatenate([x, x]) if guided else x for x in (fed_BQ, place_B))
    scores, fresh = autoregressive.decode_drafts(cfg, params, cache, both, at)
    drawn_BQ = jnp.where(after_BQ < given_B[:, None], there_BQ, draw(scores, after_BQ))
    right_BQ = jnp.cumprod(drawn_BQ[:, :-1] == fed_BQ[:, 1:], axis=1)
    count_B = jnp.minimum(1 + right_BQ.sum(axis=1), last - place_B)
    kept = jnp.concatenate([count_B, count_B]) if guided else count_B
    cache = autoregressive.commit_drafts(cfg, cache, fresh, at, kept)
    codes_BN = codes_BN.at[jnp.arange(len(codes_BN))[:, None], after_BQ].set(drawn_BQ, mode="drop")
    return cache, propose_drafts(cfg.grid, codes_BN, place_B + window, given_B, window), count_B


class SpeculativeState(NamedTuple):
    """Rows under way: of codes up to `place_B` the caches, in which that code is not, and the passes that it took."""

    cache: autoregressive.Cache
    codes_BN: jax.Array
    place_B: jax.Array
    passes_B: jax.Array


def init_speculative(
    cfg: TransformerConfig, cache: autoregressive.Cache, known_BP: jax.Array, window: int
) -> SpeculativeState:
    """The start of `speculative_decode`: the first P codes are known, the cache is as after P - 1."""
    rows, known = known_BP.shape
    codes_BN = jnp.pad(known_BP, ((0, 0), (0, cfg.num_codes - known)), mode="edge")
    place_B = jnp.full(rows, known - 1)
    codes_BN = propose_drafts(cfg.grid, codes_BN, place_B, jnp.zeros(rows, jnp.int32), window)
    return SpeculativeState(cache, codes_BN, place_B, jnp.zeros(rows, jnp.int32))


def speculative_decode(
    cfg: TransformerConfig,
    params: Params,
    state: SpeculativeState,
    keys_B: jax.Array,
    goal: jax.Array | int,
    limit: int,
    window: int,
    options: dict[str, Any],
) -> SpeculativeState:
    """Draws until the codes up to place `goal` are known of every row, each as fast as its guesses are right.

    limit: room of full layers for image tokens, to which the cache is resized; it ends before a row goes beyond.
    window: Q >= 2. options: of `pick`.
    """
    last = cfg.num_codes - 1
    each = {name: _each_place(value, window) for name, value in options.items() if name != "top_k"}
    each["top_k"] = options["top_k"]
    keys_X = jnp.repeat(keys_B, window, axis=0)
    none_B = jnp.zeros(len(keys_B), jnp.int32)

    def draw(scores, after_BQ):
        drawn_X = sample_codes(scores.reshape(-1, scores.shape[-1]), keys_X, after_BQ.ravel(), **each)
        return drawn_X.reshape(after_BQ.shape)

    def go(state: SpeculativeState) -> SpeculativeState:
        cache, codes_BN, count_B = speculative_step(
            cfg, params, state.cache, state.codes_BN, state.place_B, none_B, window, draw,
            guided=options["guidance"] is not None,
        )  # fmt: skip
        return SpeculativeState(cache, codes_BN, state.place_B + count_B, state.passes_B + (count_B > 0))

    def goes_on(state: SpeculativeState) -> jax.Array:
        room = (limit > last) | (state.place_B.max() + window <= limit)
        return (state.place_B.min() < goal) & room

    state = state._replace(cache=autoregressive.resize_cache(cfg, state.cache, limit))
    return jax.lax.while_loop(goes_on, go, state)


def _each_place(value: Any, window: int) -> Any:
    """A setting of each row as one of each place of its window."""
    return jnp.repeat(value, window, axis=0) if value is not None and jnp.ndim(value) else value


def propose_drafts(
    grid: int, codes_BN: jax.Array, top_B: jax.Array, given_B: jax.Array, count: int
) -> jax.Array:
    """First guesses for the `count` places after `top_B`, but for the `given_B` first: the code above, in the last row
    there is; else the one at `top_B`."""
    codes = codes_BN.shape[1]
    top_B1 = jnp.minimum(top_B, codes - 1)[:, None]
    ahead_1Q = jnp.arange(1, count + 1)[None]
    above_BQ = top_B1 + ahead_1Q - grid * -(-ahead_1Q // grid)
    guess_BQ = jnp.take_along_axis(codes_BN, jnp.where(above_BQ >= 0, above_BQ, top_B1), axis=1)
    places_BQ = jnp.where(top_B1 + ahead_1Q < given_B[:, None], codes, top_B1 + ahead_1Q)
    return codes_BN.at[jnp.arange(len(codes_BN))[:, None], places_BQ].set(guess_BQ, mode="drop")
