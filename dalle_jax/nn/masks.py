"""Attention masks of the sparse attention kinds (Ramesh et al. 2021, 2102.12092, B.1).

The stream is `text_len` text positions followed by a G x G raster of image tokens. Text attends causally to text and
never to the image; an image token attends to all text and, of the image, to what its kind allows.

The paper's window of `conv` "wraps around". Here it wraps as the raster does, from the end of a row to the start of the
next; in `conv_torus` (ruDALL-E Malevich v2) it wraps around both edges of the square, in `conv_clamped` (Malevich v3)
not at all.
T positions of the stream, G side of the raster.
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
    """Return the mask of image tokens as a table over query and offset.

    Args:
      kind: of the layer.
      grid: G.
      conv_kernel: side of the window of the conv kinds, odd.

    Returns:
      bool (G * G, G * G), or (1, G * G) where it is the same for all queries, read-only. [q, n] is True where the image
      token q of the raster attends to the token n before it. Entries with n > q have no meaning.

    Raises:
      ValueError: the kind is unknown.
    """
    offset, half = np.arange(grid**2), conv_kernel // 2
    match kind:
        case "full":
            table = offset >= 0
        case "row":  # the last `grid` tokens and itself, across ends of rows
            table = offset <= grid
        case "column":
            table = offset % grid == 0
        case "conv":  # the causal half of a window centered on the token
            table = np.zeros(grid**2, bool)
            for up in range(half + 1):
                for left in range(-half if up else 0, half + 1):
                    table |= offset == up * grid + left
        case "conv_clamped" | "conv_torus":
            query = offset[:, None]
            key = query - offset[None]
            distance = [abs(query // grid - key // grid), abs(query % grid - key % grid)]
            if kind == "conv_torus":
                distance = [np.minimum(d, grid - d) for d in distance]
            table = (distance[0] <= half) & (distance[1] <= half) & (key >= 0)
        case _:
            kinds = ", ".join(typing.get_args(AttentionKind))
            raise ValueError(f"Expected attention kind to be one of {kinds}, got {kind!r}.")
    table = np.atleast_2d(table)
    table.setflags(write=False)  # shared by the lru_cache
    return table


def _image_mask(kind: AttentionKind, grid: int, conv_kernel: int) -> np.ndarray:
    """Return bool (G * G, G * G); [q, k] is True where image token q attends to image token k."""
    table = np.broadcast_to(causal_offset_mask(kind, grid, conv_kernel), (grid**2, grid**2))
    offset = np.arange(grid**2)[:, None] - np.arange(grid**2)[None, :]
    return (offset >= 0) & np.take_along_axis(table, np.maximum(offset, 0), axis=1)


@functools.lru_cache(maxsize=64)
def attention_mask(kind: AttentionKind, text_len: int, grid: int, conv_kernel: int = 11) -> np.ndarray:
    """Return the mask over the stream.

    Args:
      kind: of the layer.
      text_len: text positions.
      grid: G.
      conv_kernel: side of the window of the conv kinds, odd.

    Returns:
      bool (T, T) with T = text_len + G * G, read-only; [q, k] is True where position q attends to position k.

    Raises:
      ValueError: the kind is unknown.
    """
    length = text_len + grid**2
    mask = np.zeros((length, length), bool)
    mask[:text_len, :text_len] = np.tril(np.ones((text_len, text_len), bool))
    mask[text_len:, :text_len] = True
    mask[text_len:, text_len:] = _image_mask(kind, grid, conv_kernel)
    mask.setflags(write=False)  # shared by the lru_cache
    return mask


def mask_padding(mask_TT: jax.Array, key_mask_BT: jax.Array) -> jax.Array:
    """Mask keys in each row of a batch, except that every position attends to itself.

    Args:
      mask_TT: bool, the mask of all rows.
      key_mask_BT: bool, False for positions that are padding.

    Returns:
      bool (B, T, T).
    """
    return (mask_TT[None] & key_mask_BT[:, None]) | jnp.eye(len(mask_TT), dtype=bool)[None]
