"""Sampling of image codes from captions in one jitted program: prefill, then decoding over KV caches.

Decoding is a scan over positions, one code per forward pass, or speculative (speculative.py), several codes per pass.
`generate_stream` yields the same codes in parts, as rows of the raster are finished.
B rows, C captions, T text positions, N codes, P prefix codes, M codes so far, L steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
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

CACHE_BUCKETS = 4  # sizes that the caches of full layers grow through


def row_keys(seeds: Sequence[int] | np.ndarray | jax.Array) -> jax.Array:
    """Return one key per row from integer seeds (B,) in [0, 2**32): an image depends on its caption and seed alone."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def _cache_schedule(cfg: TransformerConfig, prefix_len: int) -> list[tuple[int, int, int]]:
    """Split decoding into scans whose full layers read no more of the cache than its filled part, roughly.

    Args:
      cfg: the model.
      prefix_len: P, the first position that is fed.

    Returns:
      (first, end, cache_size) of each scan: it feeds positions [first, end), and the caches of full layers have room
      for `cache_size` image tokens. The last position of the image is not fed. One scan where no layer is full: other
      layers read no more than they attend to in any case, and each scan is compiled separately.
    """
    last = cfg.num_codes - 1
    buckets = CACHE_BUCKETS if "full" in cfg.layer_kinds and cfg.num_codes >= 128 else 1
    sizes = [cfg.num_codes * (i + 1) // buckets for i in range(buckets)]
    scans = [
        (max(first, prefix_len), min(size, last), size)
        for first, size in zip([0, *sizes[:-1]], sizes, strict=True)
    ]
    return [(first, end, size) for first, end, size in scans if first < end]


def squeeze_batch(cache: autoregressive.Cache) -> autoregressive.Cache:
    """Drop the batch axis of the caches of a single row, for the carry of a loop.

    XLA omits that axis in the products and would copy each cache from one shape to the other and back in every step
    (tests/nn/test_kv_cache.py).
    """
    return jax.tree.map(lambda x: x[0] if x.ndim == 4 and len(x) == 1 else x, cache)


def _decode(
    cfg: TransformerConfig,
    params: Params,
    cache: autoregressive.Cache,
    code_B: jax.Array,
    keys_B: jax.Array,
    first: jax.Array | int,
    num_steps: int,
    options: dict[str, Any],
) -> tuple[jax.Array, autoregressive.Cache]:
    """Feed `num_steps` codes from position `first` on, `code_B` first. Returns the next codes, (L, B), and the
    cache."""
    use_cfg, template = options["guidance_scale"] is not None, cache

    def unsqueeze(cache):
        return jax.tree.map(lambda x, like: x.reshape(like.shape), cache, template)

    def step(carry, position):
        code_B, cache = carry
        fed = jnp.concatenate([code_B, code_B]) if use_cfg else code_B
        logits, cache = autoregressive.decode_step(cfg, params, unsqueeze(cache), fed, position)
        next_B = sample_codes(logits, keys_B, position + 1, **options)
        return (next_B, squeeze_batch(cache)), next_B

    (_, cache), codes_LB = jax.lax.scan(step, (code_B, squeeze_batch(cache)), first + jnp.arange(num_steps))
    return codes_LB, unsqueeze(cache)


def _prefill(
    cfg: TransformerConfig,
    params: Params,
    text_CT: jax.Array,
    keys_B: jax.Array,
    prefix_BP: jax.Array | None,
    options: dict[str, Any],
) -> tuple[jax.Array, autoregressive.Cache]:
    """Run the captions and prefix codes. Returns the codes of position P, int32 (B,), and the cache."""
    if keys_B.ndim != 1 or not len(keys_B) or len(keys_B) % len(text_CT):
        raise ValueError(
            f"Expected one key per row, ({len(text_CT)},) or a multiple of it, got shape {keys_B.shape}. "
            "Use row_keys(seeds)."
        )
    samples_per_caption = len(keys_B) // len(text_CT)
    with jax.named_scope("prefill"):
        logits, cache = autoregressive.prefill(
            cfg, params, text_CT, prefix_BP, samples_per_caption=samples_per_caption,
            use_cfg=options["guidance_scale"] is not None,
        )  # fmt: skip
        prefix_len = 0 if prefix_BP is None else prefix_BP.shape[1]
        return sample_codes(logits, keys_B, prefix_len, **options), cache


@functools.partial(jax.jit, static_argnames=("cfg", "top_k", "draft_len", "return_num_passes"))
def generate(
    cfg: TransformerConfig,
    params: Params,
    text_CT: jax.Array,
    keys_B: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: jax.Array | float | None = None,
    guidance_scale: jax.Array | float | None = None,
    prefix_codes: jax.Array | None = None,
    draft_len: int | None = None,
    return_num_passes: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sample the codes of one image per row; jitted.

    Temperature, top_p and guidance_scale are traced: another value does not compile again. Each is a scalar or (B,).

    Args:
      cfg: the model; static.
      params: of `autoregressive.init`, or of `autoregressive.prepare_for_decode`, which saves a copy in each call.
      text_CT: int32 captions; the null caption (`dalle.null_text`) samples unconditionally.
      keys_B: one key per row (`row_keys`). B = n * C samples n images of each caption, neighbors in the result, with
        one prefill per caption.
      temperature: 0 or more; 0 is greedy decoding.
      top_k: at least 1, static; None keeps every code.
      top_p: in (0, 1]; None keeps every code.
      guidance_scale: scale of classifier-free guidance, computed with the null caption in a doubled batch; None samples
        the conditional model.
      prefix_codes: int32 (B, P), the first P < N codes of every image.
      draft_len: 2 to N, static; codes per forward pass of speculative decoding (speculative.py). The images are the
        same, up to rounding, in fewer passes, each of more work. None decodes one code per pass.
      return_num_passes: static; return the number of forward passes too.

    Returns:
      int32 (B, N), the prefix included; with `return_num_passes` also int32 (B,), the forward passes of each row after
      the prefill.

    Raises:
      ValueError: wrong shapes, P >= N, or an invalid top_k or draft_len.
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance_scale": guidance_scale,
    }
    check_draft_len(cfg, draft_len)
    params = autoregressive.prepare_for_decode(cfg, params)
    code_B, cache = _prefill(cfg, params, text_CT, keys_B, prefix_codes, options)
    prefix_len = 0 if prefix_codes is None else prefix_codes.shape[1]
    codes = [code_B[:, None]] if prefix_codes is None else [prefix_codes, code_B[:, None]]
    num_passes_B = jnp.full(len(keys_B), cfg.num_codes - 1 - prefix_len)
    with jax.named_scope("decode"):
        if draft_len is not None:
            state = init_speculative(cfg, cache, jnp.concatenate(codes, axis=1), draft_len)
            for _, _, cache_size in _cache_schedule(cfg, prefix_len):  # the next when a row could exceed it
                state = speculative_decode(
                    cfg, params, state, keys_B, cfg.num_codes - 1, cache_size, draft_len, options
                )
            return (state.codes_BN, state.num_passes_B) if return_num_passes else state.codes_BN
        for first, end, cache_size in _cache_schedule(cfg, prefix_len):
            cache = autoregressive.resize_cache(cfg, cache, cache_size)
            codes_LB, cache = _decode(
                cfg, params, cache, codes[-1][:, -1], keys_B, first, end - first, options
            )
            codes.append(codes_LB.T)
    codes_BN = jnp.concatenate(codes, axis=1).astype(jnp.int32)
    return (codes_BN, num_passes_B) if return_num_passes else codes_BN


# --- in parts ---------------------------------------------------------------------------------------------

_Programs = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


@functools.lru_cache(maxsize=16)
def _stream_programs(cfg: TransformerConfig, top_k: int | None, draft_len: int | None) -> _Programs:
    """Return jitted functions for the prefill, for resizing the cache and for decoding, which donates the cache."""

    def prefill(params, text_CT, keys_B, prefix_BP, options):
        code_B, cache = _prefill(cfg, params, text_CT, keys_B, prefix_BP, {**options, "top_k": top_k})
        if draft_len is None:
            return code_B, cache
        codes = [code_B[:, None]] if prefix_BP is None else [prefix_BP, code_B[:, None]]
        cache, *rest = init_speculative(cfg, cache, jnp.concatenate(codes, axis=1), draft_len)
        return rest, cache

    def decode(params, cache, code_B, keys_B, first, num_steps, options):
        options = {**options, "top_k": top_k}
        return _decode(cfg, params, cache, code_B, keys_B, first, num_steps, options)

    def decode_ahead(params, cache, rest, keys_B, end, cache_size, options):
        assert draft_len is not None
        state, options = SpeculativeState(cache, *rest), {**options, "top_k": top_k}
        cache, *rest = speculative_decode(cfg, params, state, keys_B, end, cache_size, draft_len, options)
        return rest, cache

    resize = jax.jit(autoregressive.resize_cache, static_argnums=(0, 2))
    decode_fn = decode_ahead if draft_len else decode
    return jax.jit(prefill), resize, jax.jit(decode_fn, static_argnums=5, donate_argnums=1)


def generate_stream(
    cfg: TransformerConfig,
    params: Params,
    text_CT: jax.Array,
    keys_B: jax.Array,
    *,
    preview_rows: int = 1,
    return_num_passes: bool = False,
    **options: Any,
) -> Iterator[Any]:
    """Yield the codes of `generate` so far, after every `preview_rows` rows of the raster.

    The device decodes the next rows while the caller uses these. With `draft_len` a part is yielded when the slowest
    image has its rows, with all rows that this image has, which can be more.

    Args:
      cfg: as for `generate`.
      params: as for `generate`.
      text_CT: as for `generate`.
      keys_B: as for `generate`.
      preview_rows: at least 1.
      return_num_passes: yield the number of forward passes so far too.
      **options: temperature, top_k, top_p, guidance_scale, prefix_codes and draft_len, as for `generate`.

    Yields:
      int32 (B, M) with growing M, the last with M = N; with `return_num_passes` pairs of it and int32 (B,).

    Raises:
      ValueError: preview_rows is below 1; what `generate` raises.
    """
    if preview_rows < 1:
        raise ValueError(f"Expected preview_rows of at least 1, got {preview_rows}.")
    options = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": None, **options}
    prefix_codes, top_k, draft_len = (
        options.pop(name, None) for name in ("prefix_codes", "top_k", "draft_len")
    )
    check_draft_len(cfg, draft_len)
    options = {name: None if value is None else jnp.float32(value) for name, value in options.items()}
    params = autoregressive.prepare_for_decode(cfg, params)
    programs = _stream_programs(cfg, top_k, draft_len)
    prefilled = programs[0](params, text_CT, keys_B, prefix_codes, options)
    prefix_BP = None if prefix_codes is None else np.asarray(prefix_codes)
    if draft_len is None:
        parts = _stream(cfg, params, programs, prefilled, keys_B, prefix_BP, preview_rows, options)
    else:
        parts = _stream_speculative(
            cfg, params, programs, prefilled, keys_B, prefix_BP, preview_rows, draft_len, options
        )
    for codes_BM, num_passes_B in parts:
        yield (codes_BM, num_passes_B) if return_num_passes else codes_BM


def _stream(
    cfg: TransformerConfig,
    params: Params,
    programs: _Programs,
    prefilled: tuple[jax.Array, autoregressive.Cache],
    keys_B: jax.Array,
    prefix_BP: np.ndarray | None,
    preview_rows: int,
    options: dict[str, Any],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield codes and passes so far; all rows are at one position."""
    (_, resize, decode), (code_B, cache) = programs, prefilled
    done = [] if prefix_BP is None else [prefix_BP]
    prefix_len = 0 if prefix_BP is None else prefix_BP.shape[1]
    position, codes_LB, cache_size = prefix_len, code_B[None], None

    def part():
        return np.concatenate(done, axis=1), np.full(len(keys_B), position - prefix_len, np.int32)

    while position < cfg.num_codes - 1:
        rows_done = (position + 1) // cfg.grid  # `codes_LB` ends with the code of `position`
        end = min((rows_done + preview_rows) * cfg.grid, cfg.num_codes) - 1
        size = next(size for _, scan_end, size in _cache_schedule(cfg, 0) if end <= scan_end)
        if size != cache_size:
            cache, cache_size = resize(cfg, cache, size), size
        next_LB, cache = decode(params, cache, codes_LB[-1], keys_B, position, end - position, options)
        done.append(np.asarray(codes_LB).T)  # waits for these codes; the next are already dispatched
        if position > prefix_len:
            yield part()
        position, codes_LB = end, next_LB
    done.append(np.asarray(codes_LB).T)
    yield part()


def _stream_speculative(
    cfg: TransformerConfig,
    params: Params,
    programs: _Programs,
    prefilled: tuple[tuple[jax.Array, jax.Array, jax.Array], autoregressive.Cache],
    keys_B: jax.Array,
    prefix_BP: np.ndarray | None,
    preview_rows: int,
    draft_len: int,
    options: dict[str, Any],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the raster rows that all images have, and the passes so far; each image is at a position of its own."""
    (_, resize, decode), (rest, cache) = programs, prefilled
    last = cfg.num_codes - 1
    sizes = [size for _, _, size in _cache_schedule(cfg, 0)]
    slowest = fastest = 0 if prefix_BP is None else prefix_BP.shape[1]
    end, cache_size, part = slowest, None, None
    while slowest < last:
        if slowest >= end:
            end = min(((slowest + 1) // cfg.grid + preview_rows) * cfg.grid, cfg.num_codes) - 1
        size = next((size for size in sizes if fastest + draft_len <= size), sizes[-1])
        if size != cache_size:
            cache, cache_size = resize(cfg, cache, size), size
        rest, cache = decode(params, cache, rest, keys_B, end, size, options)
        if part is not None:
            yield part
        codes_BN, position_B, num_passes_B = map(np.asarray, rest)
        slowest, fastest = int(position_B.min()), int(position_B.max())
        whole = (slowest + 1) // cfg.grid * cfg.grid
        part = None if slowest < end else (codes_BN[:, :whole], num_passes_B)
    yield part if part is not None else (np.asarray(rest[0]), np.asarray(rest[2]))
