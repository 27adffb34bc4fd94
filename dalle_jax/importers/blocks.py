"""Rules for the Transformer's blocks, which foreign files keep layer by layer and ours in one array for all layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dalle_jax.importers.tensors import ParamRule, Transform, identity, stack_layers, transpose_linear


def block_rules(
    layers: int, table: Mapping[str, tuple[str, Transform]], to: str = "blocks"
) -> dict[str, ParamRule]:
    """table: name below `to` -> (name in the file with {} for the number of the layer, what is done to it)."""
    return {
        f"{to}/{name}": stack_layers([source.format(i) for i in range(layers)], transform)
        for name, (source, transform) in table.items()
    }


def dense_rules(name: str, source: str, *, bias: bool = True) -> dict[str, tuple[str, Transform]]:
    """Rows of a table for one of torch's Linear layers."""
    rows = {f"{name}/kernel": (f"{source}.weight", transpose_linear)}
    return rows | ({f"{name}/bias": (f"{source}.bias", identity)} if bias else {})


def norm_rules(name: str, source: str) -> dict[str, tuple[str, Transform]]:
    """Rows of a table for one of torch's LayerNorms."""
    return {f"{name}/scale": (f"{source}.weight", identity), f"{name}/bias": (f"{source}.bias", identity)}


def fused_rules(source: str, *, bias: bool = True, join: str = ".") -> dict[str, tuple[str, Transform]]:
    """Rows of a table for queries, keys and values of one Linear layer, a third of its outputs each.

    join: what stands before `weight` and `bias`; torch's own attention has an underscore.
    """
    rows: dict[str, tuple[str, Transform]] = {}
    for i, name in enumerate("qkv"):
        rows[f"attn/{name}/kernel"] = (f"{source}{join}weight", lambda x, i=i: transpose_linear(_third(x, i)))
        if bias:
            rows[f"attn/{name}/bias"] = (f"{source}{join}bias", lambda x, i=i: _third(x, i))
    return rows


def _third(x: np.ndarray, i: int) -> np.ndarray:
    size = len(x) // 3
    return x[i * size : (i + 1) * size]
