"""Floating-point operations that a model asks for, whatever a program spends besides: what mfu is measured
by.

Only products count, matrix products and convolutions, two operations for each multiplication. An update counts the
forward pass three times, once for itself and twice for its backward pass, and nothing that is computed again to save
memory (the model FLOPs of Chowdhery et al. 2022, 2204.02311, B).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.models.registry import model_spec

Shapes = dict[str, jax.ShapeDtypeStruct]


def batch_shapes(task: Any, count: int, sharding: Any = None) -> Shapes:
    """A batch of `count` rows of a task, as shapes."""
    return {
        name: jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in task.batch_spec.items()
    }


def train_flops(task: Any) -> float:
    """Of one update of `task` (train/tasks), all devices together.

    By the formula of its model where there is one (models/registry.py); else counted in the traced step.
    """
    config = task.config
    formula = model_spec(config.model).train_flops
    if formula is not None:
        return formula(config.model, config.data.batch_size)
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.frozen)
    count = config.data.batch_size
    step = jax.ShapeDtypeStruct((), jnp.int32)

    def traced(do):
        def run(params, frozen, batch, step):
            return do(params, frozen, batch, jax.random.key(0), step)

        return jax.make_jaxpr(run)(params, frozen, batch_shapes(task, count), step)

    if hasattr(task, "gradients"):  # two networks: what is forward and what is backward is not told apart
        return count_flops(traced(task.gradients))
    return 3 * count_flops(traced(task.loss))


def count_flops(traced: Any) -> float:
    """Operations of all products in a traced function: a loop as often as it runs, a branch by its dearest arm.

    traced: what `jax.make_jaxpr` returns, or a jaxpr inside of it, with constants or without: jax 0.12 joins the two
    classes, so anything with equations counts as one. Raises ValueError where a kernel hides what it computes.
    """
    total = 0.0
    for eqn in traced.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            # Zeros that the gradient of a strided convolution puts between places are no work of the model.
            places = eqn.outvars[0].aval.size / math.prod(params["lhs_dilation"])
            total += 2.0 * places * kernel.size / features
        elif name == "pallas_call":
            raise ValueError("a Pallas kernel does not tell its operations; trace the dense form instead")
        elif name == "cond":
            total += max(count_flops(branch) for branch in params["branches"])
        else:
            inner = [v for v in params.values() if hasattr(v, "eqns")]
            total += params.get("length", 1) * sum(count_flops(j) for j in inner)
    return total
