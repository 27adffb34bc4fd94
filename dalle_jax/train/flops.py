"""Model FLOPs of a training step, the numerator of model FLOPs utilization (MFU).

Matrix products and convolutions count, two FLOPs for each multiplication. A training step counts the forward pass three
times, once for itself and twice for the backward pass; recomputation does not count (Chowdhery et al. 2022, 2204.02311,
appendix B).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from dalle_jax.models.registry import model_spec
from dalle_jax.train.task import Task


def batch_shapes(task: Task, rows: int, sharding: Sharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a batch of `rows` rows as ShapeDtypeStructs by input name."""
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in task.batch_spec.items()
    }


def train_flops(task: Task) -> float:
    """Return the model FLOPs of one training step, all devices together.

    The formula of the model is used if models/registry.py has one; otherwise the products of the traced step are
    counted.
    """
    config = task.config
    formula = model_spec(config.model).train_flops
    if formula is not None:
        return formula(config.model, config.data.batch_size)

    def trace(fn) -> Any:
        return jax.make_jaxpr(
            lambda params, frozen, batch, step: fn(params, frozen, batch, jax.random.key(0), step)
        )(
            jax.eval_shape(lambda: task.init(jax.random.key(0))),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.frozen),
            batch_shapes(task, config.data.batch_size),
            jax.ShapeDtypeStruct((), jnp.int32),
        )

    if task.single_loss:
        return 3 * count_flops(trace(task.loss))
    return count_flops(trace(task.gradients))  # forward and backward passes of several losses together


def count_flops(jaxpr: Any) -> float:
    """Count the FLOPs of all products in a traced function.

    A loop counts once for each iteration, a conditional by its most expensive branch.

    Args:
      jaxpr: Result of `jax.make_jaxpr`, or a jaxpr inside of one. jax 0.12 merges the closed and the open class, so
        this function only requires the attribute `eqns`.

    Raises:
      ValueError: If the function calls a Pallas kernel, whose products cannot be counted.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            # The gradient of a strided convolution inserts zeros between positions; products with them do not count.
            positions = eqn.outvars[0].aval.size / math.prod(params["lhs_dilation"])
            total += 2.0 * positions * kernel.size / features
        elif name == "pallas_call":
            raise ValueError(
                "Expected a program without Pallas kernels to count FLOPs, got one. Trace the dense form."
            )
        elif name == "cond":
            total += max(count_flops(branch) for branch in params["branches"])
        else:
            total += params.get("length", 1) * sum(count_flops(inner) for inner in _inner_jaxprs(params))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    return [value for value in params.values() if getattr(value, "eqns", None) is not None]
