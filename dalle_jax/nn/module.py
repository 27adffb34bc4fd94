"""Application of Linen modules to their parameters."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from dalle_jax.typing import Params


def apply_module(module: nn.Module, params: Params, *inputs: Any, **options: Any) -> Any:
    """Return `module(*inputs, **options)` with the collection `params`; no other collection is read or written."""
    return module.apply({"params": params}, *inputs, **options)
