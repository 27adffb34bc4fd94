"""Transfer of arrays between the host memory of each process and the global arrays of all processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Return which rows of a global batch this process has to read.

    Processes that share rows, because a mesh axis other than the batch's runs across them, read the same rows.

    Args:
      sharding: of the leading axis of the batch.
      batch_size: rows of the global batch.

    Returns:
      int, ascending row indices.
    """
    is_local = np.zeros(batch_size, bool)
    for index in sharding.addressable_devices_indices_map((batch_size,)).values():
        if index is not None:
            is_local[index] = True
    return np.flatnonzero(is_local)


def make_global_batch(x: np.ndarray, rows: np.ndarray, batch_size: int, sharding: NamedSharding) -> jax.Array:
    """Make a global batch from the rows of each process.

    Args:
      x: the rows of this process, (len(rows), ...).
      rows: their indices, of `local_rows`.
      batch_size: rows of the global batch.
      sharding: of the leading axis of the batch.

    Returns:
      (batch_size, ...).
    """

    def shard(index):
        start, stop, _ = index[0].indices(batch_size)
        first = np.searchsorted(rows, start)
        return x[first : first + stop - start]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)


def device_put_global(tree: Any, shardings: Any) -> Any:
    """Put arrays that every process holds as a whole onto the devices of all processes.

    Args:
      tree: arrays.
      shardings: a sharding for each of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def gather_to_host(x: jax.Array) -> np.ndarray:
    """Return the whole array in host memory. If other processes hold parts of it, all processes have to call this."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
