"""Which positions of the stream each attention kind may see (Ramesh et al. 2021, 2102.12092, B.1).

The paper's window of `conv` "wraps around". It is read here as the raster does, from row end to row begin, in
`conv_torus` (ruDALL-E Malevich v2) round both edges of the square, in `conv_clamped` (Malevich v3) not at all.

The stream is `text_len` text positions followed by a grid x grid raster of image tokens. Text sees text up
to itself and never the image; an image token sees all text and, of the image, what its kind allows.
T positions, S positions seen, G side of the grid; q and k are raster indices of image tokens.
"""

from __future__ import annotations

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import AttentionKind


@functools.lru_cache(maxsize=64)
def causal_offset_mask(kind: AttentionKind, grid: int, conv_kernel: int = 11) -> np.ndarray:
    """bool (G*G, G*G), or (1, G*G) where all places see alike: [place, n] is True where the image token at `place`
    of the raster sees the one n places before it. Places before the first do not count.

    Raises ValueError for an unknown kind.
    """
    back, half = np.arange(grid**2), conv_kernel // 2
    match kind:
        case "full":
            seen = back >= 0
        case "row":  # the last `grid` tokens and itself, across row ends
            seen = back <= grid
        case "column":
            seen = back % grid == 0
        case "conv":  # the causal half of a window centred on the token
            seen = np.zeros(grid**2, bool)
            for up in range(half + 1):
                for left in range(-half if up else 0, half + 1):
                    seen |= back == up * grid + left
        case "conv_clamped" | "conv_torus":
            place = back[:, None]
            other = place - back[None]
            apart = [abs(place // grid - other // grid), abs(place % grid - other % grid)]
            if kind == "conv_torus":
                apart = [np.minimum(a, grid - a) for a in apart]
            seen = (apart[0] <= half) & (apart[1] <= half) & (other >= 0)
        case _:
            known = ", ".join(typing.get_args(AttentionKind))
            raise ValueError(f"attention kind is {kind!r}; want one of {known}")
    seen = np.atleast_2d(seen)
    seen.setflags(write=False)  # shared by the cache above
    return seen


def _image_mask(kind: AttentionKind, grid: int, conv_kernel: int) -> np.ndarray:
    """bool (G*G, G*G): may raster index q (first axis) see raster index k (second axis)?"""
    seen = np.broadcast_to(causal_offset_mask(kind, grid, conv_kernel), (grid**2, grid**2))
    back = np.arange(grid**2)[:, None] - np.arange(grid**2)[None, :]
    return (back >= 0) & np.take_along_axis(seen, np.maximum(back, 0), axis=1)


@functools.lru_cache(maxsize=64)
def attention_mask(kind: AttentionKind, text_len: int, grid: int, conv_kernel: int = 11) -> np.ndarray:
    """bool (T, T) with T = text_len + grid**2; [q, k] is True where position q sees position k.

    Raises ValueError for an unknown kind.
    """
    length = text_len + grid**2
    mask = np.zeros((length, length), bool)
    mask[:text_len, :text_len] = np.tril(np.ones((text_len, text_len), bool))
    mask[text_len:, :text_len] = True
    mask[text_len:, text_len:] = _image_mask(kind, grid, conv_kernel)
    mask.setflags(write=False)  # shared by the cache above
    return mask


def mask_padding(mask_TT: jax.Array, key_mask_BT: jax.Array) -> jax.Array:
    """bool (B, T, T): `mask_TT` without the positions that nobody sees in a row, but that each sees itself."""
    return (mask_TT[None] & key_mask_BT[:, None]) | jnp.eye(len(mask_TT), dtype=bool)[None]
