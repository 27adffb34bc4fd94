"""State of a training run, and the training step.

`TrainState` is sharded by the parameter table of parallel/sharding.py; optimizer moments and averaged parameters have
the sharding of their parameters. The step is a pure function of the state, the frozen parameters and the batch; its
random key follows from the seed and the step number.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.config import TrainConfig
from dalle_jax.models.registry import check_model_mesh
from dalle_jax.parallel.sharding import LOGICAL_AXIS_RULES, batch_sharding, param_shardings, replicated
from dalle_jax.train.compiler_options import compiler_options
from dalle_jax.train.optim import learning_rate, update_ema
from dalle_jax.train.task import MetricDict, Task
from dalle_jax.typing import Batch, Params

# Step s uses the key fold_in(key(seed), s). These numbers are larger than any step and give the other keys of a run.
INIT, EVALUATE, SAMPLE = 2**32 - 1, 2**32 - 2, 2**32 - 3
_POST_UPDATE = np.uint32(2**32 - 1)  # folded into the key of a step; larger than any microbatch index


class TrainState(NamedTuple):
    """What a run carries from step to step.

    Attributes:
      step: int32 scalar, number of completed updates.
      params: Trained parameters.
      opt_state: State of the optimizer.
      ema: Exponential moving averages of the parameters in `Task.ema_parts`; {} if averaging is off.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params

    @property
    def eval_params(self) -> Params:
        """The parameters for evaluation and sampling: averaged where averages exist."""
        return {**self.params, **self.ema}


def run_key(seed: int, number: int | jax.Array) -> jax.Array:
    """Return the random key of step `number`, or of INIT, EVALUATE or SAMPLE."""
    data = np.uint32(number) if isinstance(number, int) else number
    return jax.random.fold_in(jax.random.key(seed), data)


def param_shapes(task: Task) -> Params:
    """Return the parameters of a task as ShapeDtypeStructs, without allocation."""
    # The key is created inside eval_shape: nothing can be computed while the mesh holds devices of another machine.
    return jax.eval_shape(lambda: task.init(jax.random.key(0)))


def task_optimizer(task: Task) -> optax.GradientTransformation:
    """Return the optimizer of a task for its own parameters."""
    return task.optimizer(param_shapes(task))


def ema_params(task: Task, params: Params) -> Params:
    """Return the top-level entries of `params` that are averaged; {} if averaging is off."""
    if not task.config.optim.ema_decay:
        return {}
    return dict(params) if task.ema_parts is None else {name: params[name] for name in task.ema_parts}


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _opt_state_sharding(
    mesh: Mesh, shape: tuple[int, ...], param_shape: tuple[int, ...], sharding: NamedSharding
) -> NamedSharding:
    """Return the sharding of an optimizer array of one parameter.

    An array of the parameter's shape has the parameter's sharding. Adafactor's row and column sums lack one axis and
    keep the sharding of the others. Placeholders are replicated.
    """
    if shape == param_shape:
        return sharding
    spec = (*sharding.spec, *[None] * (len(param_shape) - len(sharding.spec)))
    for axis in reversed(range(len(param_shape))):
        if param_shape[:axis] + param_shape[axis + 1 :] == shape:
            return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return replicated(mesh)


def abstract_state(task: Task, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the state as ShapeDtypeStructs with shardings, without allocation."""
    shapes = param_shapes(task)
    shardings = param_shardings(mesh, shapes)
    opt_shapes = jax.eval_shape(tx.init, shapes)
    # jit(tx.init) would replicate the moments; each must have the sharding of its parameter.
    opt_shardings = optax.tree.map_params(
        tx,
        lambda s, p, h: s if _is_masked(s) else _opt_state_sharding(mesh, s.shape, p.shape, h),
        opt_shapes,
        shapes,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_masked,
    )
    params = _with_shardings(shapes, shardings)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(
        step=step,
        params=params,
        opt_state=_with_shardings(opt_shapes, opt_shardings),
        ema=ema_params(task, params),
    )


def shardings_of(abstract: Any) -> Any:
    """Return the shardings of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(task: Task, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the state before the first update, created on the mesh; bit-identical on every mesh."""

    def init_fn() -> TrainState:
        params = task.init(run_key(task.config.seed, INIT))
        return TrainState(jnp.int32(0), params, tx.init(params), ema_params(task, params))

    # The initializers of all shapes are much code that runs once; on a CPU, optimizing it takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    shardings = shardings_of(abstract_state(task, tx, mesh))
    return jax.jit(init_fn, out_shardings=shardings, compiler_options=options)()


def num_batch_shards(mesh: Mesh) -> int:
    """Return the number of shards that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_AXIS_RULES["batch"])


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Check that the devices of a mesh can share the model and the batch evenly.

    Raises:
      ValueError: If they cannot.
    """
    check_model_mesh(config.model, mesh)
    shards, pieces = num_batch_shards(mesh), config.optim.grad_accum_steps
    rows = config.data.batch_size // pieces
    if rows % shards:
        split = f" in {pieces} microbatches of {rows} rows (optim.grad_accum_steps)" if pieces > 1 else ""
        axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in LOGICAL_AXIS_RULES["batch"])
        raise ValueError(
            f"Expected data.batch_size{split} divisible by the {shards} devices that share a batch (mesh {axes}), got "
            f"{config.data.batch_size}. Use a multiple of {shards * pieces}."
        )


def make_step(
    task: Task, tx: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> jax.stages.Wrapped:
    """Return the jitted training step `(state, frozen, batch) -> (state, metrics)`.

    The step donates the state: its buffers are invalid after the call. With `optim.grad_accum_steps` > 1 the gradient
    is the mean over that many microbatches, computed one after another.

    Args:
      task: Stage to train.
      tx: Optimizer, as `task_optimizer` returns it.
      config: Configuration with the batch size, seed and compiler options.
      mesh: Devices of the step.

    Returns:
      A jitted function. `batch` has `config.data.batch_size` rows for each input, and may hold bools `stop`. `metrics`
      are float32 scalars: those of the task, `loss`, `grad_norm` before clipping and `learning_rate`; the bool
      `finite`; and the bool `stop`, true if any of the batch's `stop` is. If the loss or the gradient norm is not
      finite,
      `finite` is false and the state is unchanged, including its step number.
    """
    pieces = config.optim.grad_accum_steps
    rate = learning_rate(config.optim, config.steps)
    shardings = shardings_of(abstract_state(task, tx, mesh))
    microbatch_sharding = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def microbatch_grads(params, frozen, batch, key, step):
        grads, metrics, aux = task.gradients(params, frozen, batch, key, step)
        return jax.lax.with_sharding_constraint(grads, shardings.params), metrics, aux

    def split(x):
        # Microbatch i takes rows i, i + pieces, ..., so that each device finds its part among its own rows.
        x = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, microbatch_sharding)

    def join(x):  # inverse of `split`
        return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def batch_grads(params, frozen, batch, key, step):
        if pieces == 1:
            return microbatch_grads(params, frozen, batch, key, step)
        microbatches = jax.tree.map(split, batch)
        keys = jax.random.split(key, pieces)
        first = jax.tree.map(lambda x: x[0], microbatches)
        *shapes, _ = jax.eval_shape(microbatch_grads, params, frozen, first, key, step)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total, piece):
            microbatch, key = piece
            *new, aux = microbatch_grads(params, frozen, microbatch, key, step)
            return jax.tree.map(jnp.add, total, new), aux

        total, aux = jax.lax.scan(add, zeros, (microbatches, keys))
        return *jax.tree.map(lambda x: x / pieces, total), jax.tree.map(join, aux)

    def step_fn(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, MetricDict]:
        batch = dict(batch)
        stop = batch.pop("stop", None)
        key = run_key(config.seed, state.step)
        grads, metrics, aux = batch_grads(state.params, frozen, batch, key, state.step)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        with jax.named_scope("update"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            number = state.step + 1
            ema = update_ema(state.ema, ema_params(task, params), config.optim, number)
            new = TrainState(number, params, opt_state, ema)
            if aux:
                new, more = task.post_update(new, aux, jax.random.fold_in(key, _POST_UPDATE))
                metrics |= more
            # A select fuses into the update; a cond would make a GPU wait for the host.
            new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)

        metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
        metrics |= {"grad_norm": norm, "learning_rate": rate(state.step), "finite": finite}
        if stop is not None:
            metrics["stop"] = jnp.any(stop)
        return new, metrics

    return jax.jit(
        step_fn,
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, config.compiler_options) or None,
    )
