"""The training loop of every stage.

The loop dispatches one step, then fetches the next batch and sends it to the devices while they work, then reads the
metrics of the step before: the devices never wait for the host. Row `step` of metrics.jsonl has the metrics of the
update that completed `step` updates, and checkpoint `step` holds the state after it. The data and the random key of a
step follow from the step number alone, so a run that was stopped or killed resumes exactly. With several processes,
each one runs this loop; the first writes the metrics and images, and all write the checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.checkpoint import remote_dir
from dalle_jax.checkpoint.lock import run_lock
from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.checkpoint.run_dir import opened_run_dir, sync_run_dir
from dalle_jax.config import TrainConfig
from dalle_jax.data.images import save_png
from dalle_jax.parallel.devices import peak_flops
from dalle_jax.parallel.global_arrays import device_put_global, local_rows, make_global_batch
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.preemption import PreemptionSignal, Watchdog, preemption_signals
from dalle_jax.parallel.sharding import batch_sharding, param_shardings, replicated
from dalle_jax.train.flops import train_flops
from dalle_jax.train.initialize import init_from_run
from dalle_jax.train.metrics import MetricsLog, ProgressBar, StepTimer
from dalle_jax.train.profile import Profiler
from dalle_jax.train.state import (
    EVALUATE,
    SAMPLE,
    TrainState,
    abstract_state,
    check_batch,
    init_state,
    make_step,
    num_batch_shards,
    run_key,
    task_optimizer,
)
from dalle_jax.train.task import MetricDict, Task
from dalle_jax.typing import Batch, HostBatch


class TrainResult(NamedTuple):
    """Result of one call of `train`.

    Attributes:
      state: State after the last step.
      step: Number of completed updates.
      finished: Whether all steps are done; False if a signal stopped the run.
      metrics: Metrics of the last evaluation in this call; {} if there was none.
    """

    state: TrainState
    step: int
    finished: bool
    metrics: dict[str, float]


class NonFiniteError(ArithmeticError):
    """The loss or the gradient norm of a step is not finite."""


def train(config: TrainConfig, task: Task | None = None) -> TrainResult:
    """Train a configuration to its last step, from the last checkpoint of its run directory.

    The first SIGINT or SIGTERM finishes the current step, saves a checkpoint and returns; a second signal reaches the
    previous handler. With several processes (see `parallel.processes.initialize_distributed`) all of them call this
    function with the same arguments.

    Args:
      config: The run. `config.run` names its directory.
      task: Stage to train; None uses the stage of `config.model`.

    Returns:
      The final state, and whether the run has finished.

    Raises:
      ValueError: If the devices or the run directory do not match the configuration; nothing has been written.
      OSError: If a checkpoint cannot be saved or read.
      NonFiniteError: If a loss or gradient is not finite. The last good checkpoint remains.
    """
    if config.compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache_dir)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    if task is None:
        from dalle_jax.train.tasks import make_task  # the stages import the data and sampling libraries

        task = make_task(config)
    task.check_prerequisites()
    watchdog = Watchdog(config.distributed.stall_timeout_seconds)
    try:
        with run_lock(config.run):
            with opened_run_dir(config) as run_dir:
                watchdog.at("preparing data and vocabulary")
                task.prepare(run_dir)
                sync_run_dir(run_dir)
            with jax.set_mesh(mesh), _CloseStack() as stack, preemption_signals() as signals:
                return _Trainer(config, task, mesh, run_dir, watchdog, stack, signals).run()
    finally:
        watchdog.close()


class _Trainer:
    """The open files and the state of one call of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        mesh: Mesh,
        run_dir: Path,
        watchdog: Watchdog,
        stack: _CloseStack,
        signals: PreemptionSignal,
    ):
        self.config, self.task, self.mesh, self.run_dir = config, task, mesh, run_dir
        self.watchdog, self.stack, self.signals = watchdog, stack, signals
        self.is_first_process = jax.process_index() == 0
        self.sharding = batch_sharding(mesh)
        self.tx = task_optimizer(task)
        self.frozen = (
            device_put_global(task.frozen, param_shardings(mesh, task.frozen)) if task.frozen else {}
        )
        self.local_rows = local_rows(self.sharding, config.data.batch_size)
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        # Seconds of a step at the peak of all devices; None for an unknown device.
        self.ideal_seconds = train_flops(task) / (peak * mesh.size) if peak else None
        first, last = config.profile.window or (0, 0)
        self.profiler = Profiler(first, last, run_dir / "profile" if self.is_first_process else None)
        self.evaluate_fn = jax.jit(task.evaluate)
        self.eval_batches: list[Batch] | None = None
        self.eval_metrics: dict[str, float] = {}
        self.eval_step = -1
        self.pending: tuple[int, MetricDict] | None = None  # metrics of a dispatched step, not read yet

        watchdog.at("reading the checkpoint, or creating the initial state")
        path = remote_dir.checkpoints_of(run_dir)
        self.checkpoints = stack.add(CheckpointManager(path, config.max_checkpoints, task.best))
        latest = self.checkpoints.latest
        self.start = latest or 0
        if latest is not None:
            self.state: TrainState = self.checkpoints.load(latest, abstract_state(task, self.tx, mesh))
        else:
            self.state = init_state(task, self.tx, mesh)
            if config.init_from is not None:
                self.state = init_from_run(self.state, config, mesh)
        self.progress = stack.add(
            ProgressBar(config.model.kind, self.start, config.steps, shown=self.is_first_process)
        )
        self.log: MetricsLog | None = None  # of the first process, once there is a step to do
        self.timer = StepTimer(self.start)

    def run(self) -> TrainResult:
        """Train to the last step, or to a signal."""
        config = self.config
        self._print_start()
        if self.start >= config.steps:
            self.progress.print(f"{config.run} already has its {config.steps} steps: nothing to do")
            return TrainResult(self.state, self.start, True, {})
        if self.is_first_process:
            self.log = self.stack.add(MetricsLog(self.run_dir, self.start))
        self.watchdog.at("reading the first batch")
        batches = self.stack.add(self.task.batches(self.start, self.local_rows.tolist()))
        batch = self._to_devices(next(batches))
        self.watchdog.at("compiling the training step")
        step_fn = self._compile(batch)
        self.stack.add(self.profiler)
        self.timer = StepTimer(self.start)
        done = self.start
        # A signal during start-up needs no save: the newest checkpoint is as new as the state.
        while done < config.steps and not (done == self.start and self.signals.requested()):
            if self.profiler.starts_before(done + 1):
                self._finish_pending()
                with self.timer.pause():
                    self.profiler.start()
            self.watchdog.at(f"sending step {done + 1} to the devices")
            with self.profiler.annotate(done + 1):
                self.state, metrics = step_fn(self.state, self.frozen, batch | self.signals.flags(self.mesh))
            done += 1
            if done < config.steps:
                self.watchdog.at(f"reading the batch of step {done + 1}")
                batch = self._to_devices(next(batches))
            previous, self.pending = self.pending, (done, metrics)
            self.watchdog.at(f"waiting for the devices to end step {done - 1}")
            self._read_metrics(previous)
            self.progress.update(done)
            if self.profiler.stops_after(done):
                self._finish_pending()
                with self.timer.pause():
                    self.progress.print(self.profiler.stop())
            self.checkpoints.check()
            stop = self.signals.requested()
            self._run_periodic(done, stop)
            if stop:
                break
        self._finish_pending()
        self.watchdog.at("ending the last save")
        self.checkpoints.wait()
        finished = done == config.steps
        if not finished:
            self.progress.print(f"stopped after step {done}; the same command resumes from there")
        return TrainResult(self.state, done, finished, self.eval_metrics)

    def _print_start(self) -> None:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        devices = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        if jax.process_count() > 1:
            devices += f" of {jax.process_count()} processes"
        if "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""):  # cli/startup.py
            devices += ", memory in huge pages"
        start = f"resuming from step {self.start}" if self.start else "new run"
        if self.config.init_from and not self.start:
            start += f" from {self.config.init_from}"
        self.progress.print(f"{self.config.run}: {start}; {count:,} parameters on {devices}")

    def _compile(self, batch: Batch) -> jax.stages.Compiled:
        begin = time.monotonic()
        step_fn = make_step(self.task, self.tx, self.config, self.mesh)
        compiled = step_fn.lower(self.state, self.frozen, batch | self.signals.flags(self.mesh)).compile()
        self.progress.print(f"compiled the training step in {time.monotonic() - begin:.1f} s")
        return compiled

    def _to_devices(self, batch: HostBatch) -> Batch:
        """Combine the rows that the processes have read into one global batch."""
        count = self.config.data.batch_size
        return {
            name: make_global_batch(x, self.local_rows, count, self.sharding) for name, x in batch.items()
        }

    def _eval_to_devices(self, batch: HostBatch) -> Batch:
        """Send a batch that every process has whole; replicate one whose rows do not divide."""
        shards = num_batch_shards(self.mesh)
        return {
            name: device_put_global(x, replicated(self.mesh) if len(x) % shards else self.sharding)
            for name, x in batch.items()
        }

    def _finish_pending(self) -> None:
        """Wait for the last dispatched step, so that the state is known to be finite."""
        pending, self.pending = self.pending, None
        self._read_metrics(pending)

    def _read_metrics(self, pending: tuple[int, MetricDict] | None) -> None:
        """Wait for a step and log its metrics."""
        if pending is None:
            return
        done, metrics = pending
        finite, stop = jax.device_get((metrics["finite"], metrics.get("stop", False)))  # waits
        self.signals.agreed |= bool(stop)
        if finite and done % self.config.log_every and done != self.config.steps:
            return
        values = {name: float(v) for name, v in jax.device_get(metrics).items() if v.dtype != bool}
        if not finite:
            with contextlib.suppress(OSError):  # closing the checkpoints raises the error of a failed save
                self.checkpoints.wait()  # so that the message names a save in progress
            raise NonFiniteError(
                f"step {done}: loss {values['loss']}, gradient norm {values['grad_norm']}. The update was "
                "discarded and "
                f"nothing was saved after it; the last checkpoint is of step {self.checkpoints.latest}. "
                "Look at the batch of that step, or lower optim.learning_rate."
            )
        seconds, step_seconds = self.timer.read(done)
        rows = self.config.data.batch_size / step_seconds
        timing = {
            "seconds": seconds,
            "step_seconds": step_seconds,
            "rows_per_s": rows,
            "tokens_per_s": rows * self.task.tokens_per_row,
        }
        if self.ideal_seconds is not None:
            timing["mfu"] = self.ideal_seconds / step_seconds
        if self.log is not None:
            self.log.write(done, _loss_first(values), timing)
        self.progress.report(done, values["loss"], timing, (self.config.steps - done) * step_seconds)

    def _run_periodic(self, done: int, stop: bool) -> None:
        """Evaluate, sample and save if they are due after `done` updates."""
        config, last = self.config, done == self.config.steps
        evaluate = last or done % config.eval_every == 0
        sample = last or done % config.sample_every == 0
        save = last or stop or done % config.save_every == 0
        if not (evaluate or sample or save):
            return
        self._finish_pending()
        with self.timer.pause():
            if evaluate:
                self.watchdog.at(f"evaluating after step {done}")
                self._evaluate(done)
            if sample:
                self.watchdog.at(f"generating samples after step {done}")
                self._sample(done)
            if save:  # after the metrics, so that no checkpoint is newer than its rows
                self.watchdog.at(f"saving step {done}, or finishing the previous save")
                self._save(done)

    def _evaluate(self, done: int) -> None:
        if self.eval_batches is None:
            self.eval_batches = [self._eval_to_devices(batch) for batch in self.task.eval_batches()]
        if not self.eval_batches:
            return
        key, params = run_key(self.config.seed, EVALUATE), self.state.eval_params
        metrics = jax.device_get(
            [
                self.evaluate_fn(params, self.frozen, batch, jax.random.fold_in(key, i))
                for i, batch in enumerate(self.eval_batches)
            ]
        )
        rows = np.array([len(next(iter(batch.values()))) for batch in self.eval_batches], np.float64)
        self.eval_metrics = {
            name: float(sum(float(m[name]) * n for m, n in zip(metrics, rows, strict=True)) / rows.sum())
            for name in metrics[0]
        }
        self.eval_step = done
        if self.log is not None:
            self.log.write(done, self.eval_metrics)
        values = "  ".join(f"{name} {value:.4g}" for name, value in self.eval_metrics.items())
        self.progress.print(f"step {done}: {values}")

    def _sample(self, done: int) -> None:
        grid = self.task.sample_grid(self.state.eval_params, self.frozen, run_key(self.config.seed, SAMPLE))
        if self.log is None:
            return
        path = self.run_dir / "samples" / f"step_{done:08d}.png"
        save_png(path, grid)
        self.log.image(done, "samples", np.asarray(grid.convert("RGB")))

    def _save(self, done: int) -> None:
        if self.log is not None:
            self.log.sync()
            remote_dir.upload_run(self.run_dir)
        metrics = self.eval_metrics if self.eval_step == done else None
        self.checkpoints.save(done, self.state, metrics)


def _loss_first(values: dict[str, float]) -> dict[str, float]:
    """Order metrics: `loss`, then the rest by name."""
    return {"loss": values["loss"]} | {name: values[name] for name in sorted(values) if name != "loss"}


class _Closeable(Protocol):
    def close(self) -> None: ...


_CloseableT = TypeVar("_CloseableT", bound=_Closeable)


class _CloseStack:
    """Closes what was added, last first. The first error is raised; `contextlib.ExitStack` would raise the last."""

    def __init__(self):
        self._resources: list[_Closeable] = []

    def add(self, resource: _CloseableT) -> _CloseableT:
        self._resources.append(resource)
        return resource

    def __enter__(self) -> _CloseStack:
        return self

    def __exit__(self, kind, error, trace) -> None:
        for resource in reversed(self._resources):
            try:
                resource.close()
            except Exception:
                if error is None:
                    raise
