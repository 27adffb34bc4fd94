"""Rotary position embedding of an image raster (Su et al. 2021, 2104.09864), axial as in LlamaGen (2406.06525).

Adjacent channels (2i, 2i + 1) of a head form a pair that is rotated by an angle: the first half of the pairs by the row
of the token, the second half by its column, each half with its own frequencies. Text positions have cosine and sine 0,
which sets their queries and keys to zero: the published weights were trained so.
B batch, T positions, H heads, K width of a head, R = K / 2 pairs, G side of the raster.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

_BASE = 10_000.0


@functools.lru_cache(maxsize=16)
def axial_rope_table(text_len: int, grid: int, head_dim: int) -> np.ndarray:
    """Return cosine and sine of each pair at each position.

    Args:
      text_len: text positions before the raster.
      grid: G.
      head_dim: K, a multiple of 4.

    Returns:
      float32 (text_len + G * G, 2, R), read-only.
    """
    half = head_dim // 2
    frequency = 1.0 / _BASE ** (np.arange(0, half, 2) / half)
    angle = np.arange(grid)[:, None] * frequency[None]  # (G, R / 2)
    row, column = np.divmod(np.arange(grid**2), grid)
    angles = np.concatenate([angle[row], angle[column]], axis=1)
    table = np.zeros((text_len + grid**2, 2, half), np.float32)
    table[text_len:] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    table.setflags(write=False)  # shared by the lru_cache
    return table


def apply_rope(x_BTHK: jax.Array, rope_BT2R: jax.Array) -> jax.Array:
    """Rotate queries or keys, in float32.

    Args:
      x_BTHK: queries or keys.
      rope_BT2R: rows of `axial_rope_table`; the first axis may be 1.

    Returns:
      (B, T, H, K) in the dtype of `x_BTHK`.
    """
    cos, sin = (rope_BT2R[:, :, None, i] for i in (0, 1))
    pairs = x_BTHK.astype(jnp.float32).reshape(*x_BTHK.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x_BTHK.shape).astype(x_BTHK.dtype)
