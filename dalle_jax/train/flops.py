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

from dalle_jax.config import DalleConfig

Shapes = dict[str, jax.ShapeDtypeStruct]


def batch_shapes(task: Any, count: int, sharding: Any = None) -> Shapes:
    """A batch of `count` rows of a task, as shapes."""
    return {
        name: jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in task.batch_spec.items()
    }


def train_flops(task: Any) -> float:
    """Of one update of `task` (train/tasks), all devices together.

    The Transformer of one stream by a formula, six for each weight of a matrix and token and attention over the full
    square; every other stage by what its traced step holds.
    """
    config = task.config
    if isinstance(config.model, DalleConfig):
        return 3 * dalle_flops(config.model, config.data.batch_size) + encoder_flops(
            config.model, config.data.batch_size
        )
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


def dalle_flops(model: DalleConfig, rows: int, *, text_head: bool = True) -> float:
    """Of one forward pass over the whole stream of `rows` rows."""
    matrices = 3 if model.activation == "swiglu" else 2
    block = 4 * model.dim**2 + matrices * model.dim * model.mlp_dim
    attention = 2 * model.seq_len * model.dim  # scores and their use, for each position
    per_token = model.layers * (block + attention)
    text = model.num_text_ids if text_head and model.text_loss_weight > 0 else 0
    heads = model.text_len * text + model.num_codes * model.image_vocab
    if model.text_encoder is not None:  # what brings its vectors to the width of the stream
        heads += model.text_len * (model.text_encoder.dim + model.dim)
    return 2.0 * rows * (model.seq_len * per_token + model.dim * heads)


def encoder_flops(model: DalleConfig, rows: int) -> float:
    """Of the frozen text encoder, if there is one, which no backward pass goes through."""
    if (encoder := model.text_encoder) is None:
        return 0.0
    block = 4 * encoder.dim**2 + 3 * encoder.dim * encoder.mlp_width + 2 * model.text_len * encoder.dim
    return 2.0 * rows * model.text_len * encoder.layers * block


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
