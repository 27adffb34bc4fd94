"""What a training run carries from step to step, and the step itself.

`State` is laid over the mesh by the one table of parameters (parallel/sharding.py); the optimizer's moments and the
averaged parameters lie exactly as their parameters do. The step is a pure function of the state, the frozen
parameters and the batch: its random key is derived from the seed and the step number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.config import TrainConfig
from dalle_jax.models.registry import check_mesh
from dalle_jax.parallel.sharding import RULES, batch_sharding, param_shardings, replicated
from dalle_jax.train.compiler import compiler_options
from dalle_jax.train.optim import learning_rate, make_optimizer, update_ema
from dalle_jax.typing import Params

# Training step s uses fold_in(key(seed), s); these numbers, out of reach of s, make the other keys.
INIT, EVALUATE, PICTURES = 2**32 - 1, 2**32 - 2, 2**32 - 3
POST_UPDATE = np.uint32(2**32 - 1)  # folded into the key of a step, out of reach of its microbatches


class TrainState(NamedTuple):
    """step: int32 scalar, updates done. ema: averages of those parameters that the task has averaged, or {}."""

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params

    @property
    def eval_params(self) -> Params:
        """The parameters to use the model with: averaged where they exist."""
        return {**self.params, **self.ema}


def run_key(seed: int, number: int | jax.Array) -> jax.Array:
    """The key of training step `number`, or of one of INIT, EVALUATE, PICTURES."""
    if isinstance(number, int):
        number = np.uint32(number)
    return jax.random.fold_in(jax.random.key(seed), number)


def param_shapes(task) -> Params:
    """ShapeDtypeStructs of the task's parameters, without allocation."""
    # The key is made inside: with the devices of a machine that is not here in force, nothing may be computed.
    return jax.eval_shape(lambda: task.init(jax.random.key(0)))


def task_optimizer(task) -> optax.GradientTransformation:
    """The task's own optimizer where it brings one, else that of `config.optim` for all parameters."""
    shapes = param_shapes(task)
    if hasattr(task, "optimizer"):
        return task.optimizer(shapes)
    return make_optimizer(task.config.optim, task.config.steps, shapes)


def ema_params(task, params: Params) -> Params:
    """The top-level parts of `params` that have an average: all, or those of `task.averaged`; {} where it is off."""
    if not task.config.optim.ema_decay:
        return {}
    return {name: params[name] for name in getattr(task, "averaged", params)}


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _part_sharding(shape: tuple[int, ...], whole: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """How an array that the optimizer keeps for a parameter of shape `whole` lies: as the parameter does.

    Adafactor's sums lack one axis of the parameter and lie as the others do; placeholders lie whole everywhere.
    """
    if shape == whole:
        return sharding
    spec = (*sharding.spec, *[None] * (len(whole) - len(sharding.spec)))
    for axis in reversed(range(len(whole))):
        if whole[:axis] + whole[axis + 1 :] == shape:
            return NamedSharding(sharding.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return replicated(sharding.mesh)


def abstract_state(task, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocation."""
    shapes = param_shapes(task)
    shardings = param_shardings(mesh, shapes)
    opt_shapes = jax.eval_shape(tx.init, shapes)
    whole = replicated(mesh)
    # jit(tx.init) would leave the moments whole on every device; they must lie as their parameters do.
    opt_shardings = optax.tree.map_params(
        tx,
        lambda s, p, h: s if _is_masked(s) else _part_sharding(s.shape, p.shape, h),
        opt_shapes,
        shapes,
        shardings,
        transform_non_params=lambda _: whole,
        is_leaf=_is_masked,
    )
    params = _with_shardings(shapes, shardings)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params=params,
        opt_state=_with_shardings(opt_shapes, opt_shardings),
        ema=ema_params(task, params),
    )


def shardings_of(abstract: Any) -> Any:
    """The tree of shardings in a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(task, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first update, made in place on the mesh; equal bit for bit on every mesh."""

    def make() -> TrainState:
        params = task.init(run_key(task.config.seed, INIT))
        return TrainState(jnp.int32(0), params, tx.init(params), ema_params(task, params))

    # Random numbers for every shape are much code that runs once; on a CPU, optimizing it takes far longer.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    shardings = shardings_of(abstract_state(task, tx, mesh))
    return jax.jit(make, out_shardings=shardings, compiler_options=options)()


def num_batch_shards(mesh: Mesh) -> int:
    """Devices that the rows of a batch are split over."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ValueError for a model or batch that the devices cannot share evenly."""
    check_mesh(config.model, mesh)
    ways, pieces = num_batch_shards(mesh), config.optim.grad_accum_steps
    rows = config.data.batch_size // pieces
    if rows % ways:
        split = f" in {pieces} microbatches of {rows} rows (optim.grad_accum_steps)" if pieces > 1 else ""
        raise ValueError(
            f"data.batch_size {config.data.batch_size}{split} is not divisible by the {ways} devices that share "
            f"a batch (mesh {' x '.join(f'{a}={mesh.shape[a]}' for a in RULES['batch'])}); "
            f"want a multiple of {ways * pieces}"
        )


def make_step(
    task, tx: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> Callable[[TrainState, Params, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted training step `(state, frozen, batch) -> (state, metrics)`.

    The state is donated: its buffers are gone after the call. `batch` holds `config.data.batch_size` rows; with
    `optim.grad_accum_steps` > 1 the gradient is the mean over that many microbatches, computed one after the other.
    `metrics` holds float32 scalars: what the task reports, `loss`, `grad_norm` (before clipping) and
    `learning_rate`; and `finite`, a bool. Where the loss or the gradient norm is not finite, `finite` is
    False and the state comes back as it was, step number included. Where the batch holds bools `stop` beside its
    rows, `stop` says whether one of them is True.
    """
    pieces = config.optim.grad_accum_steps
    rate = learning_rate(config.optim, config.steps)
    shardings = shardings_of(abstract_state(task, tx, mesh))
    rows = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def grads_of(params, frozen, batch, key, step):
        if hasattr(task, "gradients"):  # a task whose networks do not descend one loss
            grads, measures, left = task.gradients(params, frozen, batch, key, step)
            return jax.lax.with_sharding_constraint(grads, shardings.params), measures, left

        def loss(params):
            value, measures = task.loss(params, frozen, batch, key, step)
            return value, {**measures, "loss": value}

        (_, measures), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.lax.with_sharding_constraint(grads, shardings.params), measures, {}

    def split(x):
        # Microbatch i takes the rows i, i + pieces, ...: each device finds its part among its own rows.
        x = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, rows)

    def join(x):  # inverse of `split`
        return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def mean_grads(params, frozen, batch, key, step):
        if pieces == 1:
            return grads_of(params, frozen, batch, key, step)
        microbatches = jax.tree.map(split, batch)
        keys = jax.random.split(key, pieces)
        first = jax.tree.map(lambda x: x[0], microbatches)
        *shapes, _ = jax.eval_shape(grads_of, params, frozen, first, key, step)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total, piece):
            microbatch, key = piece
            *new, left = grads_of(params, frozen, microbatch, key, step)
            return jax.tree.map(jnp.add, total, new), left

        total, left = jax.lax.scan(add, zeros, (microbatches, keys))
        return *jax.tree.map(lambda x: x / pieces, total), jax.tree.map(join, left)

    def step_fn(state: TrainState, frozen: Params, batch: dict[str, jax.Array]):
        batch = dict(batch)
        stop = batch.pop("stop", None)
        key = run_key(config.seed, state.step)
        grads, measures, left = mean_grads(state.params, frozen, batch, key, state.step)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(measures["loss"]) & jnp.isfinite(norm)

        with jax.named_scope("update"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            number = state.step + 1
            ema = update_ema(state.ema, ema_params(task, params), config.optim, number)
            new = TrainState(number, params, opt_state, ema)
            if left:
                new, more = task.post_update(new, left, jax.random.fold_in(key, POST_UPDATE))
                measures |= more
            # A select fuses into the update; a cond would make a GPU wait for the host.
            new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)

        measures = {k: v.astype(jnp.float32) for k, v in measures.items()}
        measures |= {"grad_norm": norm, "learning_rate": rate(state.step), "finite": finite}
        if stop is not None:
            measures["stop"] = jnp.any(stop)
        return new, measures

    return jax.jit(
        step_fn,
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, config.compiler_options) or None,
    )
