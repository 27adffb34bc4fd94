"""The training loop of every stage.

One update is dispatched, then the next batch is fetched and sent to the devices while they work, then the
figures of the update *before* are read: the devices never wait for the host. Row `step` of metrics.jsonl is
what the update that made `step` updates complete has found; a checkpoint of `step` holds the state right
after it. The data of update s, and every random choice in it, follow from s alone: a run that was stopped,
in whatever way, goes on as if it had not been. On several processes each runs this loop; the first one writes what
people read, all write the checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.checkpoint import remote_dir
from dalle_jax.checkpoint.lock import run_lock
from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.checkpoint.run_dir import model_kind, opened_run_dir, sync_run_dir
from dalle_jax.config import TrainConfig
from dalle_jax.data.images import save_png
from dalle_jax.parallel.devices import peak_flops
from dalle_jax.parallel.preemption import Watchdog, preemption_signals
from dalle_jax.parallel.processes import device_put_global, local_rows, make_global_batch
from dalle_jax.parallel.sharding import batch_sharding, make_mesh, param_shardings, replicated
from dalle_jax.train.flops import train_flops
from dalle_jax.train.initialize import init_from_run
from dalle_jax.train.metrics import MetricsLog, ProgressBar, Stopwatch
from dalle_jax.train.profile import Profiler
from dalle_jax.train.state import (
    EVALUATE,
    PICTURES,
    TrainState,
    abstract_state,
    check_batch,
    init_state,
    make_step,
    num_batch_shards,
    run_key,
    task_optimizer,
)
from dalle_jax.typing import HostBatch, Params


class Task(Protocol):
    """What a stage brings to the loop; `tasks/` holds the stages.

    batches: the batches of steps `start`, `start + 1`, ..., of each only the given rows: those that this process
    has to read. eval_batches: whole batches, the same on every process. pictures: called by every process; what
    it draws from arrays that lie over all of them it gets with `processes.fetch`.
    """

    config: TrainConfig
    best: tuple[str, Literal["min", "max"]]  # the evaluation measure that decides which checkpoint is best
    tokens_per_row: int
    frozen: Params  # parameters that are used and not trained; {} if none
    # Name to shape and dtype of a row that `loss` takes, image tokens as codes.
    batch_spec: dict[str, tuple[tuple[int, ...], Any]]

    def prepare(self, run_dir: Path) -> None: ...
    def init(self, key: jax.Array) -> Params: ...
    def loss(self, params, frozen, batch, key, step) -> tuple[jax.Array, dict[str, jax.Array]]: ...

    # A task whose networks do not all descend one loss has, in its place, `gradients` with the same arguments,
    # which returns (gradients, measures with `loss`, arrays with a row for each of the batch), and `optimizer(params)`.
    # Where it leaves such arrays, `post_update(state, arrays, key)` returns the state after the update as it shall be, and
    # more measures.

    def batches(self, start: int, rows: np.ndarray | None = None) -> Iterator[HostBatch]: ...
    def eval_batches(self) -> list[HostBatch]: ...
    def evaluate(self, params, frozen, batch, key) -> dict[str, jax.Array]: ...
    def sample_grid(self, params, frozen, key) -> Any: ...


class TrainResult(NamedTuple):
    """What a run came to. finished: all steps are done; False when a signal stopped it."""

    state: TrainState
    step: int
    finished: bool
    measures: dict[str, float]  # of the last evaluation in this call; {} if there was none


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not finite."""


def train(config: TrainConfig, task: Task | None = None) -> TrainResult:
    """Trains `config` to its last step, from where its run directory is.

    task: the stage; None takes the one of `config.model`. SIGINT and SIGTERM let the step finish, save and
    return with `finished=False`; a second one acts as it would have without us.

    Raises ValueError for a configuration that the devices or the run directory do not allow (before anything
    is written), OSError when a save fails or a checkpoint cannot be read, NonFiniteError for a loss or
    gradient that is not finite. In each case the last good checkpoint stays the last one.

    On several processes (joined before, see `train.processes.initialize_distributed`) all call with the same arguments.
    """
    if config.compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache_dir)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    if task is None:
        from dalle_jax.train.tasks import make_task

        task = make_task(config)
    watchdog = Watchdog(config.distributed.stall_timeout_seconds)
    try:
        with run_lock(config.run):
            with opened_run_dir(config) as run_dir:
                watchdog.at("preparing data and vocabulary")
                task.prepare(run_dir)
                sync_run_dir(run_dir)
            with jax.set_mesh(mesh):
                return _Training(config, task, mesh, run_dir, watchdog).run()
    finally:
        watchdog.close()


class _Training:
    """The open files and the moving parts of one call of `run`."""

    def __init__(self, config: TrainConfig, task: Task, mesh: Mesh, run_dir: Path, watchdog: Watchdog):
        self.config, self.task, self.mesh, self.run_dir = config, task, mesh, run_dir
        self.at = watchdog.at
        self.first_process = jax.process_index() == 0
        self.rows_sharding = batch_sharding(mesh)
        self.tx = task_optimizer(task)
        self.frozen = (
            device_put_global(task.frozen, param_shardings(mesh, task.frozen)) if task.frozen else {}
        )
        self.rows = local_rows(self.rows_sharding, config.data.batch_size)
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        # Seconds of an update at the peak of all devices; None where that is not known.
        self.ideal = train_flops(task) / (peak * mesh.size) if peak else None
        first, last = config.profile.window or (0, 0)
        self.profiler = Profiler(first, last, run_dir / "profile" if self.first_process else None)
        self.evaluate_fn = jax.jit(task.evaluate)
        self.eval_batches: list[dict[str, jax.Array]] | None = None
        self.measures: dict[str, float] = {}
        self.measured_at = -1
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def run(self) -> TrainResult:
        config, task = self.config, self.task
        with _Closing() as closing, preemption_signals() as stop:
            self.at("reading the checkpoint, or making the first state")
            self.checkpoints = closing.add(
                CheckpointManager(remote_dir.checkpoints_of(self.run_dir), config.max_checkpoints, task.best)
            )
            abstract = abstract_state(task, self.tx, self.mesh)
            start = self.checkpoints.latest
            if start is None:
                state, start = init_state(task, self.tx, self.mesh), 0
                if config.init_from is not None:
                    state = init_from_run(state, config, self.mesh)
            else:
                state = self.checkpoints.load(start, abstract)
            self.progress = closing.add(
                ProgressBar(model_kind(config), start, config.steps, shown=self.first_process)
            )
            self.stop = stop
            self._greet(abstract, start)
            if start >= config.steps:
                self.progress.say(f"{config.run} has its {config.steps} steps already: nothing to do")
                return TrainResult(state, start, True, {})
            if self.first_process:
                self.log = closing.add(MetricsLog(self.run_dir, start))
            return self._steps(state, abstract, start, closing)

    def _greet(self, abstract: TrainState, start: int) -> None:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
        devices = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        if (count_ := jax.process_count()) > 1:
            devices += f" of {count_} processes"
        fresh = f"new run from {self.config.init_from}" if self.config.init_from else "new run"
        begin = f"goes on from step {start}" if start else fresh
        self.progress.say(f"{self.config.run}: {begin}; {count:,} parameters on {devices}")

    def _steps(self, state: TrainState, abstract: TrainState, start: int, closing: _Closing) -> TrainResult:
        config = self.config
        self.at("reading the first batch")
        batches = self.task.batches(start, self.rows)
        closing.add(batches)
        batch = self._put(next(batches))
        self.at("compiling the training step")
        step_fn = self._compile(state, batch)
        closing.add(self.profiler)
        self.watch = Stopwatch()
        self.since = start
        done = start
        while done < config.steps:
            if (
                done == start and self.stop.requested()
            ):  # during start-up: what is on disk is as new as the state
                break
            if self.profiler.begins(done + 1):
                self._drain()
                with self.watch.pause():
                    self.profiler.start()
            self.at(f"sending step {done + 1} to the devices")
            with self.profiler.step(done + 1):
                state, metrics = step_fn(state, self.frozen, batch | self.stop.flags(self.mesh))
            done += 1
            last = done == config.steps
            if not last:
                self.at(f"reading the batch of step {done + 1}")
                batch = self._put(next(batches))
            previous, self.pending = self.pending, (done, metrics)
            self.at(f"waiting for the devices to end step {done - 1}")
            self._read(previous)
            self.progress.step(done)
            if self.profiler.ends(done):
                self._drain()
                with self.watch.pause():
                    self.progress.say(self.profiler.stop())
            self.checkpoints.check()
            stop = self.stop.requested()

            evaluate = last or done % config.eval_every == 0
            sample = last or done % config.sample_every == 0
            save = last or stop or done % config.save_every == 0
            if evaluate or sample or save:
                self._drain()
                with self.watch.pause():
                    if evaluate:
                        self.at(f"measuring after step {done}")
                        self._evaluate(state, done)
                    if sample:
                        self.at(f"drawing samples after step {done}")
                        self._sample(state, done)
                    if save:  # after the rows, so that no checkpoint is newer than they are
                        self.at(f"saving step {done}, or ending the save before it")
                        self._save(state, done)
            if stop:
                break
        self._drain()
        self.at("ending the last save")
        self.checkpoints.wait()
        finished = done == config.steps
        if not finished:
            self.progress.say(f"stopped after step {done}; the same command goes on from there")
        return TrainResult(state, done, finished, self.measures)

    def _compile(self, state: TrainState, batch: dict[str, jax.Array]):
        begin = time.monotonic()
        fn = make_step(self.task, self.tx, self.config, self.mesh)
        compiled = fn.lower(state, self.frozen, batch | self.stop.flags(self.mesh)).compile()
        self.progress.say(f"compiled the training step in {time.monotonic() - begin:.1f} s")
        return compiled

    def _put(self, batch: HostBatch) -> dict[str, jax.Array]:
        """The rows read by all processes as one batch over the mesh."""
        count = self.config.data.batch_size
        return {name: make_global_batch(x, self.rows, count, self.rows_sharding) for name, x in batch.items()}

    def _put_whole(self, batch: HostBatch) -> dict[str, jax.Array]:
        """A batch that every process has whole; one that does not divide goes whole to each device."""

        def put(x):
            divides = len(x) % num_batch_shards(self.mesh) == 0
            return device_put_global(x, self.rows_sharding if divides else replicated(self.mesh))

        return {name: put(x) for name, x in batch.items()}

    def _drain(self) -> None:
        """Reads what is still to be read: the state after it is known to be good."""
        pending, self.pending = self.pending, None
        self._read(pending)

    def _read(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        if pending is None:
            return
        done, metrics = pending
        finite, stop = jax.device_get((metrics["finite"], metrics.get("stop", False)))  # waits for that step
        self.stop.agreed |= bool(stop)
        last = done == self.config.steps
        if finite and done % self.config.log_every and not last:
            return
        values = {name: float(v) for name, v in jax.device_get(metrics).items() if v.dtype != bool}
        if not finite:
            with contextlib.suppress(OSError):  # a save that fails is told when the checkpoints are closed
                self.checkpoints.wait()  # else one on its way would not be named
            raise NonFiniteError(
                f"step {done}: loss {values['loss']}, gradient norm {values['grad_norm']}. The update "
                "was not made and nothing was saved after it; the last checkpoint is of step "
                f"{self.checkpoints.latest}. "
                "Look at the batch of that step, or lower optim.learning_rate"
            )
        seconds = self.watch.read()
        step_seconds = seconds / (done - self.since)
        self.since = done
        rows = self.config.data.batch_size / step_seconds
        timing = {
            "seconds": seconds,
            "step_seconds": step_seconds,
            "rows_per_s": rows,
            "tokens_per_s": rows * self.task.tokens_per_row,
        }
        if self.ideal is not None:
            timing["mfu"] = self.ideal / step_seconds
        if self.first_process:
            self.log.write(done, _ordered(values), timing)
        self.progress.report(done, values["loss"], timing, (self.config.steps - done) * step_seconds)

    def _evaluate(self, state: TrainState, done: int) -> None:
        if self.eval_batches is None:
            self.eval_batches = [self._put_whole(batch) for batch in self.task.eval_batches()]
        key = run_key(self.config.seed, EVALUATE)
        found = [
            self.evaluate_fn(state.eval_params, self.frozen, batch, jax.random.fold_in(key, i))
            for i, batch in enumerate(self.eval_batches)
        ]
        if not found:
            return
        rows = np.array([len(next(iter(batch.values()))) for batch in self.eval_batches], np.float64)
        found = jax.device_get(found)
        self.measures = {
            name: float(sum(float(f[name]) * n for f, n in zip(found, rows, strict=True)) / rows.sum())
            for name in found[0]
        }
        self.measured_at = done
        if self.first_process:
            self.log.write(done, self.measures)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in self.measures.items())
        self.progress.say(f"step {done}: {figures}")

    def _sample(self, state: TrainState, done: int) -> None:
        picture = self.task.sample_grid(state.eval_params, self.frozen, run_key(self.config.seed, PICTURES))
        if not self.first_process:
            return
        path = self.run_dir / "samples" / f"step_{done:08d}.png"
        save_png(path, picture)
        self.log.image(done, "samples", np.asarray(picture.convert("RGB")))

    def _save(self, state: TrainState, done: int) -> None:
        if self.first_process:
            self.log.sync()
            remote_dir.push(self.run_dir)
        self.checkpoints.save(done, state, self.measures if self.measured_at == done else None)


def _ordered(values: dict[str, float]) -> dict[str, float]:
    """`loss` first, then the rest by name: one order whatever jax did to the dict."""
    return {"loss": values["loss"]} | {name: values[name] for name in sorted(values) if name != "loss"}


class _Closing:
    """Closes what was opened, last first, and lets the first error through."""

    def __init__(self):
        self._things: list[Any] = []

    def add(self, thing: Any) -> Any:
        self._things.append(thing)
        return thing

    def __enter__(self) -> _Closing:
        return self

    def __exit__(self, kind, error, trace) -> None:
        for thing in reversed(self._things):
            try:
                if hasattr(thing, "close"):
                    thing.close()
            except Exception:
                if error is None:
                    raise
