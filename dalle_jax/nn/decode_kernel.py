"""Attention of one decode step as one GPU kernel over the KV cache, where XLA makes several (cache.attend_step, which
computes the same and is what this is tested against).

A program takes a head of a few rows on one caption. It walks the caption's keys, held once, and of the image only the
slots that hold what its rows see, and writes their new key and value. Softmax is taken as it goes (Milakov and
Gimelshein 2018, 1805.02867; FlashAttention, 2205.14135), in float32, in each of S lanes for itself, of every block a
position each: lanes meet once, at the end. Where rows and heads are fewer than the programs that a GPU wants, several
share the blocks, and XLA adds up what each found (flash-decoding, Dao et al. 2023). A key meets one query or four, so
products go without tensor cores, and float32 stays float32.

Triton compiles in every version of jax that we support, and for Ampere too; since jax 0.11 it is marked as deprecated
in favour of Mosaic GPU. Not run on a GPU yet: compiled for one, and interpreted on a CPU.
B rows, C captions, T text positions, W tokens kept, R tokens read, H heads, K width of a head, M rows of a program,
S lanes, P programs that share the blocks of a head.
"""

from __future__ import annotations

import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dalle_jax.config import DalleConfig, Kernels
from dalle_jax.config.dalle import AttentionKind
from dalle_jax.nn import cache as kv
from dalle_jax.nn.cache import KV, LayerCache
from dalle_jax.nn.flash import platform

HELD = 4096  # M * S * K: numbers of keys that a program holds at once, 32 for each of 128 threads
ROWS = 4  # M at most: of twice as many Triton makes a layout that computes each number twice
PROGRAMS = 256  # two for each processor of an H100, about
HIDDEN = jnp.finfo(jnp.float32).min


def chosen(kernels: Kernels, cfg: DalleConfig):
    """`attend_step` of the kernels asked for. Raises ValueError where they cannot run."""
    match kernels:
        case "xla":
            return kv.attend_step
        case "pallas" | "pallas-interpret":
            check(kernels, cfg)
            return functools.partial(attend_step, interpret=kernels == "pallas-interpret")
    raise ValueError(f"kernels is {kernels!r}; want one of {', '.join(typing.get_args(Kernels))}")


def check(kernels: Kernels, cfg: DalleConfig) -> None:
    """Raises ValueError where Pallas kernels cannot draw with this model on what is here."""
    mesh = jax.sharding.get_abstract_mesh()
    for holds, message in (
        (
            kernels == "pallas-interpret" or platform() in ("gpu", "cuda"),
            f"kernels pallas needs an NVIDIA GPU, jax runs on {platform()}; take xla, or to test pallas-interpret",
        ),
        (
            cfg.head_dim & (cfg.head_dim - 1) == 0 and cfg.head_dim <= HELD,
            f"kernels pallas needs heads whose width is a power of two, up to {HELD}; these are {cfg.head_dim} "
            "wide: take xla",
        ),
        (
            mesh.empty or mesh.size == 1,
            f"kernels pallas draws on one device, the mesh has {mesh.size}: take xla",
        ),
    ):
        if not holds:
            raise ValueError(message)


def attend_step(
    cfg: DalleConfig,
    kind: AttentionKind,
    cache: LayerCache,
    new: tuple[jax.Array, jax.Array, jax.Array],
    place: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, LayerCache]:
    """As cache.attend_step: `new` is a query, key and value of each row, (B, 1, H, K) each. Returns (B, 1, H, K)."""
    dtype = cache.image.k.dtype
    q_BHK, k_BHK, v_BHK = (x[:, 0].astype(dtype) for x in new)
    rows, heads, width = q_BHK.shape
    slots, captions = cache.image.k.shape[2], tuple(len(text.k) for text in cache.text)
    seen_XR = kv.visible(cfg, kind, slots, place).astype(jnp.int8)
    tile, shares = _plan(
        rows, captions, heads, width, cache.text[0].k.shape[2], seen_XR.shape[1], place.ndim > 0
    )
    text = [(kv_.k, kv_.v) for kv_ in cache.text]
    if cache.seen:
        text = [(*keys, seen.astype(jnp.int8)) for keys, seen in zip(text, cache.seen, strict=True)]
    args = (jnp.atleast_1d(place), seen_XR, q_BHK, k_BHK, v_BHK, text, *cache.image)
    image = [jax.ShapeDtypeStruct(x.shape, dtype) for x in cache.image]
    if shares == 1:
        found = [jax.ShapeDtypeStruct(q_BHK.shape, dtype)]
    else:
        found = [jax.ShapeDtypeStruct((shares, *q_BHK.shape), jnp.float32)]
        found += [jax.ShapeDtypeStruct((shares, rows, heads), jnp.float32)] * 2
    count = len(jax.tree.leaves(args))
    k, v, *found = pl.pallas_call(
        functools.partial(_program, cfg, kind, tile, shares),
        grid=(rows // tile, heads, shares),
        out_shape=(*image, *found),
        input_output_aliases={count - 2: 0, count - 1: 1},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_attention",
    )(*args)
    y_BHK = found[0] if shares == 1 else _added(*found).astype(dtype)
    return y_BHK[:, None], cache._replace(image=KV(k, v))


def _plan(rows, captions, heads, width, text, read, apart: bool) -> tuple[int, int]:
    """M rows of a program, on one caption and at one place, and P programs for each."""
    each = math.gcd(*(rows // len(captions) // count for count in captions))
    tile = 1 if apart else min(ROWS, each & -each, HELD // width)
    while tile > 1 and rows // tile * heads < PROGRAMS:
        tile //= 2
    blocks, shares = _blocks(tile, width, text) + _blocks(tile, width, read), 1
    while rows // tile * heads * shares < PROGRAMS and 2 * shares <= blocks:
        shares *= 2
    return tile, shares


def _blocks(tile: int, width: int, positions):
    """Blocks of S positions."""
    return pl.cdiv(positions, HELD // (tile * width))


def _program(cfg, kind, tile, shares, place_X, seen_XR, q_BHK, k_BHK, v_BHK, text, k_BHWK, v_BHWK, *out):
    """Every argument from `place_X` on is a reference to the whole array."""
    row, head, share = pl.program_id(0) * tile, pl.program_id(1), pl.program_id(2)
    (total, _, width), rows = q_BHK.shape, pl.ds(row, tile)
    lanes = HELD // (tile * width)
    lane_S = jnp.arange(lanes)
    at = row if place_X.shape[0] > 1 else jnp.int32(0)
    place = place_X[at]
    own, (first, count) = kv.slot(cfg, kind, place), kv.span(cfg, kind, place)
    q_MK = q_BHK[rows, head, :].astype(jnp.float32) * (1.0 / math.sqrt(width))
    new_MK = KV(k_BHK[rows, head, :], v_BHK[rows, head, :])

    def look(state, k_MSK, v_MSK, seen_S):
        top_MS, sum_MS, y_MSK = state
        score_MS = jnp.sum(q_MK[:, None] * k_MSK.astype(jnp.float32), axis=-1)
        score_MS = jnp.where(seen_S[None], score_MS, HIDDEN)
        new_MS = jnp.maximum(top_MS, score_MS)
        old_MS, part_MS = jnp.exp(top_MS - new_MS), jnp.exp(score_MS - new_MS)
        y_MSK = y_MSK * old_MS[:, :, None] + part_MS[:, :, None] * v_MSK.astype(jnp.float32)
        return new_MS, sum_MS * old_MS + part_MS, y_MSK

    def walk(state, blocks, block):
        """`look` at this program's part of so many blocks, `block(i)` the keys, values and what is seen of them."""
        mine = jax.lax.div(blocks - share + shares - 1, shares)
        return jax.lax.fori_loop(0, mine, lambda i, state: look(state, *block(share + i * shares)), state)

    # The new token begins: one lane of one program has it, and so a sum that is not nothing.
    begins_MS = jnp.broadcast_to(((lane_S == 0) & (share == 0))[None], (tile, lanes))
    score_M1 = jnp.sum(q_MK * new_MK.k.astype(jnp.float32), axis=-1)[:, None]
    state = (
        jnp.where(begins_MS, score_M1, HIDDEN),
        begins_MS.astype(jnp.float32),
        jnp.where(begins_MS[:, :, None], new_MK.v.astype(jnp.float32)[:, None], 0.0),
    )
    for group, (k_CHTK, v_CHTK, *seen) in enumerate(text):
        here = total // len(text)
        caption = jax.lax.div(row - group * here, here // k_CHTK.shape[0])
        length = k_CHTK.shape[2]

        def of_text(i, k=k_CHTK, v=v_CHTK, seen=seen, caption=caption, length=length):
            there_S = lane_S + i * lanes < length
            part, mask = pl.ds(i * lanes, lanes), jnp.broadcast_to(there_S[None, :, None], (1, lanes, width))
            k, v = (triton.load(x.at[pl.ds(caption, 1), head, part, :], mask=mask, other=0) for x in (k, v))
            if seen:
                there_S &= triton.load(seen[0].at[caption, part], mask=there_S, other=0) != 0
            return k, v, there_S

        blocks = (jax.lax.div(row, here) == group) * jnp.int32(_blocks(tile, width, length))
        state = walk(state, blocks, of_text)

    def of_image(i):
        slot_S = first + i * lanes + lane_S
        there_S = slot_S < first + count
        part = pl.ds(first + i * lanes, lanes)
        mask = jnp.broadcast_to(there_S[None, :, None], (tile, lanes, width))
        k, v = (triton.load(x.at[rows, head, part, :], mask=mask, other=0) for x in (k_BHWK, v_BHWK))
        seen_S = triton.load(seen_XR.at[at, pl.ds(i * lanes, lanes)], mask=there_S, other=0) != 0
        return k, v, seen_S & (slot_S != own)

    state = walk(state, _blocks(tile, width, count), of_image)

    @pl.when(share == 0)
    def _():
        for x_BHWK, x_MK in zip(out, new_MK, strict=False):
            x_BHWK[rows, head, own, :] = x_MK

    top_MS, sum_MS, y_MSK = state
    top_M = jnp.max(top_MS, axis=1)
    weight_MS = jnp.exp(top_MS - top_M[:, None])
    sum_M = jnp.sum(sum_MS * weight_MS, axis=1)
    y_MK = jnp.sum(y_MSK * weight_MS[:, :, None], axis=1)
    if shares == 1:
        out[2][rows, head, :] = (y_MK / sum_M[:, None]).astype(out[2].dtype)
    else:
        for x, found in zip(out[2:], (y_MK, top_M, sum_M), strict=True):
            x.at[share, rows, head][...] = found


def _added(y_PBHK: jax.Array, top_PBH: jax.Array, sum_PBH: jax.Array) -> jax.Array:
    """(B, H, K): what P programs found. A program that saw nothing has no weight."""
    # One by one, which XLA makes one kernel of; of a maximum and a sum over P it makes two.
    top_BH = functools.reduce(jnp.maximum, top_PBH)
    weights = [jnp.exp(x - top_BH) for x in top_PBH]
    y_BHK = sum(y * weight[:, :, None] for y, weight in zip(y_PBHK, weights, strict=True))
    return y_BHK / sum(x * weight for x, weight in zip(sum_PBH, weights, strict=True))[:, :, None]
