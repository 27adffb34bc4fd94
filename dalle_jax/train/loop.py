"""The training loop of every stage, and the command line around it.

One update is dispatched, then the next batch is fetched and sent to the devices while they work, then the
figures of the update *before* are read: the devices never wait for the host. Row `step` of metrics.jsonl is
what the update that made `step` updates complete has found; a checkpoint of `step` holds the state right
after it. The data of update s, and every random choice in it, follow from s alone: a run that was stopped,
in whatever way, goes on as if it had not been.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dalle_jax.config import TrainConfig
from dalle_jax.nn.sharding import MeshError, batch_sharding, make_mesh, param_shardings, replicated
from dalle_jax.train import compile_only
from dalle_jax.train.checkpoint import Checkpoints
from dalle_jax.train.metrics import MetricsLog, Progress, Stopwatch
from dalle_jax.train.rundir import begun_run, load_config, stage
from dalle_jax.train.start import apply_flags, begin_from
from dalle_jax.train.state import (
    EVALUATE,
    PICTURES,
    State,
    abstract_state,
    batch_ways,
    check_batch,
    init_state,
    make_step,
    run_key,
    task_optimizer,
)  # fmt: skip

Params = dict[str, Any]
Batch = dict[str, np.ndarray]


class Task(Protocol):
    """What a stage brings to the loop; `tasks.py` holds the stages."""

    config: TrainConfig
    best: tuple[str, Literal["min", "max"]]  # the evaluation measure that decides which checkpoint is best
    tokens_per_row: int
    frozen: Params  # parameters that are used and not trained; {} if none

    def prepare(self, run_dir: Path) -> None: ...
    def init(self, key: jax.Array) -> Params: ...
    def loss(self, params, frozen, batch, key, step) -> tuple[jax.Array, dict[str, jax.Array]]: ...

    # A task whose networks do not all descend one loss has, in its place, `gradients` with the same arguments,
    # which returns (gradients, measures with `loss`), and `optimizer(params)`.

    def batches(self, start: int) -> Iterator[Batch]: ...
    def eval_batches(self) -> list[Batch]: ...
    def evaluate(self, params, frozen, batch, key) -> dict[str, jax.Array]: ...
    def pictures(self, params, frozen, key) -> Any: ...


class Outcome(NamedTuple):
    """What a run came to. finished: all steps are done; False when a signal stopped it."""

    state: State
    step: int
    finished: bool
    measures: dict[str, float]  # of the last evaluation in this call; {} if there was none


class NotFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not finite."""


def run(config: TrainConfig, task: Task | None = None) -> Outcome:
    """Trains `config` to its last step, from where its run directory is.

    task: the stage; None takes the one of `config.model`. SIGINT and SIGTERM let the step finish, save and
    return with `finished=False`; a second one acts as it would have without us.

    Raises ValueError for a configuration that the devices or the run directory do not allow (before anything
    is written), OSError when a save fails or a checkpoint cannot be read, NotFiniteError for a loss or
    gradient that is not finite. In each case the last good checkpoint stays the last one.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    if task is None:
        from dalle_jax.train.tasks import make_task

        task = make_task(config)
    with begun_run(config) as run_dir:
        task.prepare(run_dir)
    with jax.set_mesh(mesh):
        return _Training(config, task, mesh, run_dir).run()


class _Training:
    """The open files and the moving parts of one call of `run`."""

    def __init__(self, config: TrainConfig, task: Task, mesh: Mesh, run_dir: Path):
        self.config, self.task, self.mesh, self.run_dir = config, task, mesh, run_dir
        self.first_process = jax.process_index() == 0
        self.rows_sharding = batch_sharding(mesh)
        self.tx = task_optimizer(task)
        self.frozen = jax.device_put(task.frozen, param_shardings(mesh, task.frozen)) if task.frozen else {}
        self.evaluate_fn = jax.jit(task.evaluate)
        self.eval_batches: list[dict[str, jax.Array]] | None = None
        self.measures: dict[str, float] = {}
        self.measured_at = -1
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def run(self) -> Outcome:
        config, task = self.config, self.task
        with _Closing() as closing, _stop_signals() as stop:
            self.checkpoints = closing.add(Checkpoints(self.run_dir / "checkpoints", config.keep, task.best))
            abstract = abstract_state(task, self.tx, self.mesh)
            start = self.checkpoints.latest
            if start is None:
                state, start = init_state(task, self.tx, self.mesh), 0
                if config.init_from is not None:
                    state = begin_from(state, config, self.mesh)
            else:
                state = self.checkpoints.load(start, abstract)
            self.progress = closing.add(
                Progress(stage(config), start, config.steps, shown=self.first_process)
            )
            self.stop = stop
            self._greet(abstract, start)
            if start >= config.steps:
                self.progress.say(f"{self.run_dir} has its {config.steps} steps already: nothing to do")
                return Outcome(state, start, True, {})
            if self.first_process:
                self.log = closing.add(MetricsLog(self.run_dir, start))
            return self._steps(state, abstract, start, closing)

    def _greet(self, abstract: State, start: int) -> None:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
        devices = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        fresh = f"new run from {self.config.init_from}" if self.config.init_from else "new run"
        begin = f"goes on from step {start}" if start else fresh
        self.progress.say(f"{self.run_dir}: {begin}; {count:,} parameters on {devices}")

    def _steps(self, state: State, abstract: State, start: int, closing: _Closing) -> Outcome:
        config = self.config
        batches = self.task.batches(start)
        closing.add(batches)
        batch = self._put(next(batches))
        step_fn = self._compile(state, batch)
        self.watch = Stopwatch()
        self.since = start
        done = start
        while done < config.steps:
            if done == start and self.stop.asked():  # during start-up: what is on disk is as new as the state
                break
            state, metrics = step_fn(state, self.frozen, batch)
            done += 1
            last = done == config.steps
            if not last:
                batch = self._put(next(batches))
            previous, self.pending = self.pending, (done, metrics)
            self._read(previous)
            self.progress.step(done)
            self.checkpoints.check()
            stop = self.stop.asked(done)

            evaluate = last or done % config.eval_every == 0
            sample = last or done % config.sample_every == 0
            save = last or stop or done % config.save_every == 0
            if evaluate or sample or save:
                self._drain()
                with self.watch.pause():
                    if evaluate:
                        self._evaluate(state, done)
                    if sample:
                        self._sample(state, done)
                    if save:  # after the rows, so that no checkpoint is newer than they are
                        self._save(state, done)
            if stop:
                break
        self._drain()
        self.checkpoints.wait()
        finished = done == config.steps
        if not finished:
            self.progress.say(f"stopped after step {done}; the same command goes on from there")
        return Outcome(state, done, finished, self.measures)

    def _compile(self, state: State, batch: dict[str, jax.Array]):
        begin = time.monotonic()
        fn = make_step(self.task, self.tx, self.config, self.mesh)
        compiled = fn.lower(state, self.frozen, batch).compile()
        self.progress.say(f"compiled the training step in {time.monotonic() - begin:.1f} s")
        return compiled

    def _put(self, batch: Batch) -> dict[str, jax.Array]:
        """The local rows of a batch as one array over the mesh; rows that do not divide go whole to each."""
        ways = batch_ways(self.mesh)

        def put(x):
            rows = len(x) * jax.process_count()
            sharding = self.rows_sharding if rows % ways == 0 else replicated(self.mesh)
            return jax.make_array_from_process_local_data(sharding, x)

        return jax.tree.map(put, dict(batch))

    def _drain(self) -> None:
        """Reads what is still to be read: the state after it is known to be good."""
        pending, self.pending = self.pending, None
        self._read(pending)

    def _read(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        if pending is None:
            return
        done, metrics = pending
        finite = bool(metrics["finite"])  # waits for that step
        last = done == self.config.steps
        if finite and done % self.config.log_every and not last:
            return
        values = {name: float(v) for name, v in jax.device_get(metrics).items() if name != "finite"}
        if not finite:
            raise NotFiniteError(
                f"step {done}: loss {values['loss']}, gradient norm {values['grad_norm']}. The update "
                "was not made and nothing was saved after it; the last checkpoint is of step "
                f"{self.checkpoints.latest}. "
                "Look at the batch of that step, or lower optim.learning_rate"
            )
        rows = (done - self.since) * self.config.data.batch / (seconds := self.watch.read())
        left = (self.config.steps - done) * seconds / (done - self.since)
        self.since = done
        tokens = rows * self.task.tokens_per_row
        if self.first_process:
            timing = {"seconds": seconds, "rows_per_s": rows, "tokens_per_s": tokens}
            self.log.write(done, _ordered(values), timing)
        self.progress.report(done, values["loss"], rows, tokens, left)

    def _evaluate(self, state: State, done: int) -> None:
        if self.eval_batches is None:
            self.eval_batches = [self._put(batch) for batch in self.task.eval_batches()]
        key = run_key(self.config.seed, EVALUATE)
        found = [
            self.evaluate_fn(state.weights, self.frozen, batch, jax.random.fold_in(key, i))
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

    def _sample(self, state: State, done: int) -> None:
        picture = self.task.pictures(state.weights, self.frozen, run_key(self.config.seed, PICTURES))
        if not self.first_process:
            return
        path = self.run_dir / "samples" / f"step_{done:08d}.png"
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            picture.save(beside, format="PNG")
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        self.log.picture(done, "samples", np.asarray(picture.convert("RGB")))

    def _save(self, state: State, done: int) -> None:
        if self.first_process:
            self.log.sync()
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


class _Stop:
    """Set by a signal; read between steps."""

    def __init__(self):
        self.signal: int | None = None

    def asked(self, done: int = 0) -> bool:
        if (
            jax.process_count() > 1
        ):  # every process must stop at the same step: jax tells them of a preemption
            return multihost_utils.reached_preemption_sync_point(done)
        return self.signal is not None


@contextmanager
def _stop_signals():
    """Turns the first SIGINT or SIGTERM into a request to stop; the next one acts as it did before."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return
    before = {}

    def restore():
        while before:
            signal.signal(*before.popitem())

    def handle(number, frame):
        stop.signal = number
        restore()
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: finishing the step, then saving; once more to abort\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    """`CONFIG.py [--field value ...]`: trains, and returns the exit code.

    With `--compile-only TOPOLOGY [--slices N] [--json]` it compiles instead (train/compile_only.py): 0 where
    the step fits, 2 for a mesh, batch or topology that do not go together, 3 where it does not fit.

    0: finished, or stopped by a signal with its state saved. 1: a configuration, file or disk that does not
    allow to go on, told in one message. 2: a command line that is not understood, or a mesh that does not go
    with the devices or the model. 3: a loss or gradient that is not finite. 130: interrupted twice, or before
    the first step. With the environment variable DALLE_JAX_TRACEBACK set, errors come with their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = (
        f"usage: {prog} CONFIG.py [--field value ...]\n       {prog} CONFIG.py --help lists the fields\n"
        "       --data.path PATH reads a folder, tar files, an npz file or a TFDS data set\n"
        f"       {prog} CONFIG.py --compile-only v5p:4x4x4 [--slices N | --sample ROWS] [--json]\n"
        "       compiles the step, or the drawing of pictures, for a topology or the devices here (local)"
    )
    if not argv or argv[0].startswith("-"):
        helped = bool(argv) and argv[0] in ("-h", "--help")
        print(usage, file=sys.stdout if helped else sys.stderr)
        return 0 if helped else 2
    try:
        argv, flags = compile_only.split_flags(argv)
        config = parse(argv, prog)
        if flags.compile_only is not None:
            return compile_only.main(config, flags, prog)
        run(config)
    except SystemExit as exit:  # tyro has told what it did not understand, or --help
        return exit.code if isinstance(exit.code, int) else 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotFiniteError) as error:
        if os.environ.get("DALLE_JAX_TRACEBACK"):
            raise
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 3 if isinstance(error, NotFiniteError) else 2 if isinstance(error, MeshError) else 1
    return 0


def parse(argv: list[str], prog: str = "train.py") -> TrainConfig:
    """The configuration of the file `argv[0]` with the flags that follow it.

    Raises what `load_config` raises, ValueError for values that do not go together, SystemExit for flags that
    do not exist (the nearest ones are printed).
    """
    config, flags = apply_flags(load_config(argv[0]), argv[1:])
    return tyro.cli(
        tyro.conf.AvoidSubcommands[TrainConfig], default=config, args=flags, prog=f"{prog} {argv[0]}"
    )
