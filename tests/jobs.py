"""Trainings of several real processes, for tests.

The processes are forked from a server that has imported everything, because imports take longer than the training.
Sizes are such that a training takes seconds also on a busy machine: XLA ends a process whose collective has waited 40
s.
"""

import atexit
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
from fake_task import FakeTask, tiny_config

from dalle_jax.checkpoint.manager import CheckpointManager, on_one_device
from dalle_jax.config import TrainConfig
from dalle_jax.train import loop
from dalle_jax.train.metrics import read_metrics

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["conftest", "dalle_jax.cli.train"])

CHANGES = {
    "steps": 24,
    "save_every": 4,
    "log_every": 1,
    "eval_every": 8,
    "sample_every": 12,
}  # of tiny_config
HEARTBEAT = 10  # seconds, in tests that lose a process
SHORT = [
    "--distributed.heartbeat-timeout-seconds",
    str(HEARTBEAT),
    "--distributed.initialization-timeout-seconds",
    "60",
]
BOUND = 240  # seconds until all processes must have ended, on a busy machine


class SlowTask(FakeTask):
    """FakeTask in which an event (see Job) happens to a process when it reads the batch of a step."""

    event = ("none", -1, -1)

    def batches(self, start, rows=None):
        what, who, when = self.event
        for step, batch in enumerate(super().batches(start, rows), start):
            time.sleep(0.02)
            if (step, jax.process_index()) == (when, who):
                match what:
                    case "hang":
                        time.sleep(10_000)
                    case "raise":
                        raise TypeError("planted")
                    case _:
                        os.kill(os.getpid(), getattr(signal, what))
            yield batch


def train(
    log: Path,
    devices: int,
    event: tuple[str, int, int],
    config: TrainConfig | dict,
    argv: list[str],
    env=None,
):
    """The main function of a process of a Job: the command line, with FakeTask if `config` is a dict."""
    os.environ.update(env or {})
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from dalle_jax.cli import main
    from dalle_jax.cli import train as command

    jax.config.update("jax_num_cpu_devices", devices)
    if isinstance(config, dict):
        sys.modules["dalle_jax.train.tasks"] = types.ModuleType("tasks")
        sys.modules["dalle_jax.train.tasks"].make_task = type("Task", (SlowTask,), {"event": event})
        config = tiny_config(**config)
    else:  # a process with cached programs would wait for the others longer than CPU collectives allow
        jax.config.update("jax_enable_compilation_cache", False)
    command.load_config = lambda path: config
    code = main(["train", *argv])
    atexit._run_exitfuncs()  # processes of multiprocessing end without them
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Job:
    """A training in `run` of `count` processes with `devices` each.

    Args:
      run: run directory; the logs are next to it.
      count: processes.
      devices: of each process.
      event: WHAT:PROCESS:STEP, what a process does to itself when it reads the batch of a step: the name of a signal,
        `hang` or `raise`.
      flags: of the command line.
      config: of a real stage; None is FakeTask.
      url: of the run, instead of `run`.
      env: environment variables of the processes.
      **changes: of FakeTask's configuration, on top of `CHANGES`.
    """

    def __init__(
        self,
        run: Path,
        count: int,
        devices: int,
        event="none:-1:-1",
        flags=(),
        config=None,
        url=None,
        env=None,
        **changes,
    ):
        self.run = run
        run.parent.mkdir(exist_ok=True, parents=True)
        what, who, when = event.split(":")
        port, self.processes = free_port(), []
        self.logs = [run.with_name(f"{run.name}.{p}.log") for p in range(count)]
        for p, log in enumerate(self.logs):
            argv = ["config.py", "--run", url or str(run), *flags]
            if count > 1:
                where = {"coordinator_address": f"localhost:{port}", "num_processes": count, "process_id": p}
                argv += [word for n, v in where.items() for word in (f"--distributed.{n}", str(v))]
            args = (log, devices, (what, int(who), int(when)), config or CHANGES | changes, argv, env)
            self.processes.append(CONTEXT.Process(target=train, args=args, daemon=True))
            self.processes[-1].start()

    def codes(self) -> list[int]:
        """Exit codes after all have ended; None for a process that runs longer than BOUND seconds."""
        for p in self.processes:
            p.join(BOUND)
        codes = [p.exitcode for p in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for p in self.processes:
            p.kill()

    def log(self, p: int) -> str:
        return self.logs[p].read_text()

    def logs_text(self) -> str:
        return "\n".join(f"process {p}:\n{self.log(p)}" for p in range(len(self.logs)))

    def reaches(self, step: int) -> bool:
        """Wait for the metrics of a step; False if a process ends before."""
        file = self.run / "metrics.jsonl"
        for _ in range(30_000):
            if file.exists() and f'"step": {step},' in file.read_text():
                return True
            if not all(p.is_alive() for p in self.processes):
                return False
            time.sleep(0.01)
        return False


def series(run: Path) -> list[dict]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "timing"} for row in rows]


def assert_close(got: list[dict], want: list[dict], rtol=1e-5, atol=1e-6) -> None:
    """Assert equal steps and metrics, up to the order of sums over devices."""
    assert [(r["step"], list(r)) for r in got] == [(r["step"], list(r)) for r in want]
    for g, w in zip(got, want, strict=True):
        for name in w:
            if w[name] is None or g[name] is None:  # such as a discriminator before its start
                assert g[name] is w[name], f"{name}, {g['step']}: {g[name]}, want {w[name]}"
            else:
                np.testing.assert_allclose(g[name], w[name], rtol, atol, err_msg=f"{name}, {g['step']}")


def saved_params(run: Path) -> dict:
    """Return the averaged parameters of the latest checkpoint."""
    checkpoints = CheckpointManager(run / "checkpoints")
    try:
        step = checkpoints.latest
        saved = checkpoints.shapes(step)
        name = "ema" if saved["ema"] else "params"
        return checkpoints.load(step, {name: on_one_device(saved[name])}, partial=True)[name]
    finally:
        checkpoints.close()


def assert_same_params(a: Path, b: Path, rtol=1e-5, atol=1e-6) -> None:
    params_a, params_b = (saved_params(run) for run in (a, b))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(params_a), jax.tree.leaves(params_b), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol, atol, err_msg=jax.tree_util.keystr(path))


def straight_run(run: Path, **changes) -> Path:
    """Train in one process with eight devices, without an event."""
    config = tiny_config(run, **CHANGES | changes)
    loop.train(config, FakeTask(config))
    return run


def saved_steps(run: Path) -> list[int]:
    """Return the steps with a checkpoint; fails for one that cannot be read."""
    path = run / "checkpoints"
    if not path.is_dir():
        return []
    checkpoints = CheckpointManager(path)
    try:
        assert checkpoints.steps == sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal())
        for step in checkpoints.steps:
            state = checkpoints.load(step, on_one_device(checkpoints.shapes(step)))
            assert state["step"] == step
        return checkpoints.steps
    finally:
        checkpoints.close()


def unfinished_saves(run: Path) -> set[int]:
    """Return the steps whose save has started and not ended."""
    names = [p.name for p in (run / "checkpoints").iterdir() if p.name.endswith(".orbax-checkpoint-tmp")]
    return {int(name.partition(".")[0]) for name in names}


def only_process_0_logs(job: Job) -> None:
    """Assert that only process 0 logs metrics and the saved configuration has no fields of processes."""
    assert "loss" in job.log(0)
    assert not any("loss" in job.log(p) for p in range(1, len(job.logs)))
    written = json.loads((job.run / "config.json").read_text())["distributed"]
    assert written["coordinator_address"] is written["num_processes"] is written["process_id"] is None


def starved(job: Job) -> bool:
    """Return whether CPU collectives, which time out after 30 s, failed on a busy machine."""
    return "Gloo context initialization failed" in job.logs_text()
