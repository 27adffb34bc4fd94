"""Codes from captions in one jitted program: a prefill, then scans over the places that are left, or with `jacobi`
passes over several places at once (jacobi.py). `generate_stream` has them in parts, as rows of the raster are done.

B rows, C captions, T text positions, N codes, P codes given in advance, V image vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import TransformerConfig
from dalle_jax.models import autoregressive
from dalle_jax.sampling.logits import sample_codes
from dalle_jax.sampling.speculative import (
    SpeculativeState,
    check_draft_len,
    init_speculative,
    speculative_decode,
)
from dalle_jax.typing import Params


def row_keys(seeds) -> jax.Array:
    """One key per row from integer seeds (B,): a row's picture follows from its caption and seed alone."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def cache_schedule(cfg: TransformerConfig, given: int) -> list[tuple[int, int, int]]:
    """(first, end, limit) of the scans that feed the places from `given` on, but the last, to the model.

    The caches of full layers have room for `limit` image tokens in each, and a step reads no more. One scan where
    no layer is full: the others read no more than they see in any case, and each scan is compiled by itself.
    """
    last = cfg.num_codes - 1
    ways = CACHE_BUCKETS if "full" in cfg.layer_kinds and cfg.num_codes >= 128 else 1
    ends = [cfg.num_codes * (i + 1) // ways for i in range(ways)]
    starts = [0, *ends[:-1]]
    found = [(max(a, given), min(b, last), b) for a, b in zip(starts, ends, strict=True)]
    return [(a, b, limit) for a, b, limit in found if a < b]


CACHE_BUCKETS = 4


def squeeze_batch(cache: autoregressive.Cache) -> autoregressive.Cache:
    """The caches as a loop carries them: a single row's without the axis of rows.

    XLA leaves that axis out of the products, and would copy each cache in every step from one shape to the other and
    back (tests/nn/test_cache.py).
    """
    return jax.tree.map(lambda x: x[0] if x.ndim == 4 and len(x) == 1 else x, cache)


def _advance(cfg, params, cache, code_B, keys_B, first, count, options):
    """Feeds `count` codes, `code_B` at place `first` to begin with. Returns codes (count, B), and the caches."""
    guided, like = options["guidance"] is not None, cache

    def whole(cache):
        return jax.tree.map(lambda x, old: x.reshape(old.shape), cache, like)

    def step(carry, place):
        code_B, cache = carry
        fed = jnp.concatenate([code_B, code_B]) if guided else code_B
        logits, cache = autoregressive.decode_step(cfg, params, whole(cache), fed, place)
        next_B = sample_codes(logits, keys_B, place + 1, **options)
        return (next_B, squeeze_batch(cache)), next_B

    (_, cache), codes = jax.lax.scan(step, (code_B, squeeze_batch(cache)), first + jnp.arange(count))
    return codes, whole(cache)


def _begin(cfg, params, text_CT, keys_B, prefix_BP, options):
    """Returns the codes of place P, int32 (B,), and the caches."""
    if keys_B.ndim != 1 or not len(keys_B) or len(keys_B) % len(text_CT):
        raise ValueError(
            f"keys have shape {keys_B.shape}, want one per row: ({len(text_CT)},); use row_keys(seeds), with as "
            "many seeds for each caption"
        )
    copies = len(keys_B) // len(text_CT)
    with jax.named_scope("prefill"):
        logits, cache = autoregressive.prefill(
            cfg, params, text_CT, prefix_BP, copies=copies, guided=options["guidance"] is not None
        )
        given = 0 if prefix_BP is None else prefix_BP.shape[1]
        return sample_codes(logits, keys_B, given, **options), cache


@functools.partial(jax.jit, static_argnames=("cfg", "top_k", "jacobi", "return_passes"))
def generate(
    cfg: TransformerConfig,
    params: Params,
    text_CT: jax.Array,
    keys_B: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: jax.Array | float | None = None,
    guidance: jax.Array | float | None = None,
    prefix_BP: jax.Array | None = None,
    jacobi: int | None = None,
    return_passes: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Draw the codes of one picture per row.

    params: as `dalle.init` makes them, or as `autoregressive.prepare_for_decode` does, which saves a copy in each call.
    text_CT: int32 (C, T); the null caption (`dalle.null_text`) samples without a caption.
    keys_B: one key per row (`row_keys`); B = n * C draws n pictures of each caption, neighbours in the result,
    and runs each caption once. temperature: 0 is greedy. top_k: static, None keeps all codes. top_p: share in
    (0, 1], None keeps all. guidance: scale of classifier-free guidance, computed with the null caption in a
    doubled batch; None samples the conditional model in a single batch. prefix_BP: int32, the first P < N codes
    of every picture. Temperature, top_p and guidance are traced, scalars or (B,): another value does not
    compile again. jacobi: static, codes that one pass of the network looks at: the pictures are the same, up to
    rounding, in fewer passes, each of more work (jacobi.py); None draws one code a pass.
    Returns int32 (B, N), the given codes included; with `return_passes` also int32 (B,), the passes that each row took
    after the prefill. Raises ValueError for wrong shapes, P >= N, or `jacobi` outside 2 to N.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    check_draft_len(cfg, jacobi)
    params = autoregressive.prepare_for_decode(cfg, params)
    code_B, cache = _begin(cfg, params, text_CT, keys_B, prefix_BP, options)
    given = 0 if prefix_BP is None else prefix_BP.shape[1]
    codes = [] if prefix_BP is None else [prefix_BP]
    codes.append(code_B[:, None])
    passes_B = jnp.full(len(keys_B), cfg.num_codes - 1 - given)
    with jax.named_scope("decode"):
        if jacobi is not None:
            state = init_speculative(cfg, cache, jnp.concatenate(codes, axis=1), jacobi)
            for _, _, limit in cache_schedule(cfg, given):  # the next where a row could go beyond
                state = speculative_decode(
                    cfg, params, state, keys_B, cfg.num_codes - 1, limit, jacobi, options
                )
            return (state.codes_BN, state.passes_B) if return_passes else state.codes_BN
        for first, end, limit in cache_schedule(cfg, given):
            cache = autoregressive.resize_cache(cfg, cache, limit)
            rest, cache = _advance(cfg, params, cache, codes[-1][:, -1], keys_B, first, end - first, options)
            codes.append(rest.T)
    codes = jnp.concatenate(codes, axis=1).astype(jnp.int32)
    return (codes, passes_B) if return_passes else codes


@functools.lru_cache(maxsize=16)
def _programs(cfg: TransformerConfig, top_k: int | None, jacobi: int | None):
    """Prefill, another room in the caches, and steps as programs of their own; the caches of a call are taken over by
    the next."""

    def begin(params, text_CT, keys_B, prefix_BP, options):
        code_B, cache = _begin(cfg, params, text_CT, keys_B, prefix_BP, {**options, "top_k": top_k})
        if jacobi is None:
            return code_B, cache
        known = [code_B[:, None]] if prefix_BP is None else [prefix_BP, code_B[:, None]]
        cache, *state = init_speculative(cfg, cache, jnp.concatenate(known, axis=1), jacobi)
        return state, cache

    def advance(params, cache, code_B, keys_B, first, count, options):
        options = {**options, "top_k": top_k}
        return _advance(cfg, params, cache, code_B, keys_B, first, count, options)

    def ahead(params, cache, state, keys_B, goal, limit, options):
        options = {**options, "top_k": top_k}
        cache, *state = speculative_decode(
            cfg, params, SpeculativeState(cache, *state), keys_B, goal, limit, jacobi, options
        )
        return state, cache

    resize = jax.jit(autoregressive.resize_cache, static_argnums=(0, 2))
    return jax.jit(begin), resize, jax.jit(ahead if jacobi else advance, static_argnums=5, donate_argnums=1)


def generate_stream(
    cfg: TransformerConfig,
    params: Params,
    text_CT: jax.Array,
    keys_B: jax.Array,
    *,
    rows: int = 1,
    return_passes: bool = False,
    **options,
) -> Iterator[Any]:
    """The codes of `generate` as they come: int32 (B, M) after every `rows` rows of the raster, M to N.

    Takes the options of `generate`; with `return_passes` pairs of codes and passes so far, int32 (B,). With `jacobi`
    a part comes when the slowest picture has its rows, and has what that one has, which can be more rows at once.
    The next rows are under way while the caller looks at these.
    Raises ValueError for `rows` below 1, and what `generate` does.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; want a picture every 1 or more rows of codes")
    options = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": None, **options}
    prefix_BP, top_k, jacobi = (options.pop(name, None) for name in ("prefix_BP", "top_k", "jacobi"))
    check_draft_len(cfg, jacobi)
    options = {n: None if v is None else jnp.float32(v) for n, v in options.items()}
    params = autoregressive.prepare_for_decode(cfg, params)
    programs = _programs(cfg, top_k, jacobi)
    begun = programs[0](params, text_CT, keys_B, prefix_BP, options)
    given = None if prefix_BP is None else np.asarray(prefix_BP)
    if jacobi is None:
        parts = _rows(cfg, params, programs, begun, keys_B, given, rows, options)
    else:
        parts = _rows_ahead(cfg, params, programs, begun, keys_B, given, rows, jacobi, options)
    for codes, passes_B in parts:
        yield (codes, passes_B) if return_passes else codes


def _rows(cfg, params, programs, begun, keys_B, given_BP, rows, options):
    """All pictures are at one place: the codes up to there, and the passes."""
    (_, resize, advance), (code_B, cache) = programs, begun
    done = [] if given_BP is None else [given_BP]
    given = sum(part.shape[1] for part in done)
    place, new, room = given, code_B[None], None

    def part():
        return np.concatenate(done, axis=1), np.full(len(keys_B), place - given, np.int32)

    while place < cfg.num_codes - 1:
        rows_done = (place + 1) // cfg.grid  # `new` ends with the code of `place`
        end = min((rows_done + rows) * cfg.grid, cfg.num_codes) - 1
        limit = next(limit for _, upto, limit in cache_schedule(cfg, 0) if end <= upto)
        if limit != room:
            cache, room = resize(cfg, cache, limit), limit
        codes, cache = advance(params, cache, new[-1], keys_B, place, end - place, options)
        done.append(np.asarray(new).T)  # waits for the codes before, while the next are on their way
        if place > given:
            yield part()
        place, new = end, codes
    done.append(np.asarray(new).T)
    yield part()


def _rows_ahead(cfg, params, programs, begun, keys_B, given_BP, rows, jacobi, options):
    """Each picture is at a place of its own: the rows that all have, and the passes."""
    _, resize, ahead = programs
    (codes_BN, place_B, passes_B), cache = begun
    last = cfg.num_codes - 1
    limits = [limit for _, _, limit in cache_schedule(cfg, 0)]
    slowest = fastest = 0 if given_BP is None else given_BP.shape[1]
    goal, room, part = slowest, None, None
    while slowest < last:
        if slowest >= goal:
            goal = min(((slowest + 1) // cfg.grid + rows) * cfg.grid, cfg.num_codes) - 1
        limit = next((limit for limit in limits if fastest + jacobi <= limit), limits[-1])
        if limit != room:
            cache, room = resize(cfg, cache, limit), limit
        (codes_BN, place_B, passes_B), cache = ahead(
            params, cache, (codes_BN, place_B, passes_B), keys_B, goal, limit, options
        )
        if part is not None:
            yield part
        places = np.asarray(place_B)
        slowest, fastest = places.min(), places.max()
        whole = (slowest + 1) // cfg.grid * cfg.grid
        part = None if slowest < goal else (np.asarray(codes_BN)[:, :whole], np.asarray(passes_B))
    yield part if part is not None else (np.asarray(codes_BN), np.asarray(passes_B))
