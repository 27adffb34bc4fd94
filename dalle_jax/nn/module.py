"""Application of Linen modules to their parameters, and of layers in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from dalle_jax.typing import Params


def apply_module(module: nn.Module, params: Params, *inputs: Any, **options: Any) -> Any:
    """Return `module(*inputs, **options)` with the collection `params`; no other collection is read or written."""
    return module.apply({"params": params}, *inputs, **options)


# A loop over layers copies the parameters of each layer out of the stack and its activations into one, which costs a
# small model on a CPU a third of a step; a model of many layers compiles in a time that grows with their number.
_MAX_UNROLLED = 8


def scan_layers(
    layer: Callable[..., jax.Array], x: jax.Array, layers: Any, unroll: int | None = None
) -> jax.Array:
    """Apply a layer for each entry of the stacked arrays `layers`.

    Args:
      layer: maps x and one entry to the next x.
      x: input of the first layer.
      layers: pytree of arrays with a leading axis of layers.
      unroll: layers per iteration of the loop; None is all of up to 8 layers, and 1 of more.
    """
    count = len(jax.tree.leaves(layers)[0])
    if unroll is None:
        unroll = count if count <= _MAX_UNROLLED else 1
    return jax.lax.scan(lambda x, entry: (layer(x, entry), None), x, layers, unroll=min(unroll, count))[0]
