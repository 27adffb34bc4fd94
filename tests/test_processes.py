"""Several processes as one training: joining, whose rows are whose, the stop that all agree on, and loss of one."""

import atexit
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FakeTask, tiny_config

from dalle_jax.config import DistributedConfig, MeshConfig
from dalle_jax.nn.sharding import batch_sharding, make_mesh
from dalle_jax.train import loop, processes, rundir, stop
from dalle_jax.train.metrics import read_metrics
from dalle_jax.train.processes import begin_processes, local_rows, place_rows
from dalle_jax.train.topology import peak_flops

# --- joining --------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.fixture
def joined(monkeypatch):
    """The arguments of each call of jax.distributed.initialize; no mark of a cluster, no libtpu."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    return calls


def test_a_machine_alone_joins_nothing(joined, monkeypatch):
    begin_processes(DistributedConfig())
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    begin_processes(DistributedConfig(processes=1))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    begin_processes(DistributedConfig())
    assert joined == []


@pytest.mark.parametrize(
    ("marks", "tpu"),
    [
        (SLURM, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, False),
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({}, True),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, False),
    ],
)
def test_a_cluster_is_found_by_its_marks(joined, monkeypatch, marks, tpu):
    if tpu:
        monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    for name, value in marks.items():
        monkeypatch.setenv(name, value)
    begin_processes(DistributedConfig(heartbeat_seconds=7))
    ((args, named),) = joined
    assert args == (None, None, None) and named["cluster_detection_method"] is None
    assert named["heartbeat_timeout_seconds"] == 7


def test_flags_go_before_the_cluster(joined, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    begin_processes(DistributedConfig(coordinator="h:12", processes=3, process=2))
    ((args, named),) = joined
    assert args == ("h:12", 3, 2) and named["cluster_detection_method"] == "deactivate"


def test_a_cluster_that_jax_cannot_make_out_is_no_reason_to_train_n_times_alone(joined, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match=r"several processes of Open MPI.*--distributed\.coordinator HOST:PORT"
    ):
        begin_processes(DistributedConfig())
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    begin_processes(DistributedConfig())  # a TPU without a metadata server is one host


def test_processes_that_do_not_meet_are_told(joined, monkeypatch):
    def time_out(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", time_out)
    with pytest.raises(
        OSError, match=r"\(h:12\) in 5 s: DEADLINE_EXCEEDED: Barrier timed out\.\. Look whether"
    ):
        begin_processes(DistributedConfig(coordinator="h:12", processes=3, process=2, start_seconds=5))


# --- rows -----------------------------------------------------------------------------------------------


class _Some:
    """A sharding of which only some devices are this process's."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self.sharding.devices_indices_map(shape).items() if d in self.devices}


def test_rows_follow_from_the_devices():
    """By hand, 16 rows over data 2 x fsdp 2 (4 rows each), model 2: device (d, f, m) holds rows 4 (2 d + f)."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    sharding, grid = batch_sharding(mesh), mesh.devices.reshape(2, 2, 2)  # one slice
    for held, rows in (
        (grid[0], range(8)),
        (grid[:, 1], [*range(4, 8), *range(12, 16)]),  # not neighbours
        (grid[:, :, 0], range(16)),  # the model axis runs across the processes: both read all
        (grid[1, 0, 1:], range(8, 12)),
    ):
        got = local_rows(_Some(sharding, set(held.ravel())), 16)
        np.testing.assert_array_equal(got, list(rows))


def test_placed_rows_are_the_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    x = np.arange(16 * 3).reshape(16, 3)
    placed = place_rows(x, np.arange(16), 16, batch_sharding(mesh))
    np.testing.assert_array_equal(placed, x)
    assert placed.sharding == batch_sharding(mesh)


# --- peak, profile, watchdog ----------------------------------------------------------------------------


def test_peaks_are_those_of_the_makers():
    for kind, peak in (
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None), ("cpu", None), ("TPU v7x", None),
    ):  # fmt: skip
        assert peak_flops(kind) == peak, kind


def test_utilisation_is_model_flops_over_peak_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda kind: 1e6)
    monkeypatch.setattr(loop, "train_flops", lambda config: 4e3)
    config = tiny_config(tmp_path / "run", steps=2)
    loop.run(config, FakeTask(config))
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        if "timing" in row:
            want = 4e3 / (1e6 * 8) / row["timing"]["step_seconds"]
            assert row["timing"]["utilisation"] == pytest.approx(want, rel=0.01, abs=1e-6)


def test_the_profile_holds_the_steps_that_were_asked_for(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", steps=6, profile={"steps": "3:4"})
    loop.run(config, FakeTask(config))
    assert "steps 3 to 4 are recorded" in capsys.readouterr().err
    (file,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    marks = {
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert marks == {3, 4}


def test_a_watchdog_ends_what_does_not_move_and_says_what_it_was_at(monkeypatch, capfd):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(stop.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(stop.jax, "process_count", lambda: 2)
    dog = stop.Watchdog(0.2)
    dog.at("reading the batch of step 7")
    assert ended.wait(60)
    assert codes == [processes.LOST]
    told = capfd.readouterr().err
    assert "nothing has moved for 0.2 s" in told and "it was reading the batch of step 7" in told
    assert "test_processes.py" in told  # where the main thread was


# --- real processes -------------------------------------------------------------------------------------

# Processes come from a server that has imported everything: importing takes longer than the training.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["conftest", "dalle_jax.train.command"])


class SlowTask(FakeTask):
    """EVENT (see Job) happens to the process when it reads the batch of the step."""

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


def train(log: Path, devices: int, event: tuple[str, int, int], changes: dict, argv: list[str]) -> None:
    """What a process of a Job does: the command line, with FakeTask for the stage."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from dalle_jax.train import command

    jax.config.update("jax_num_cpu_devices", devices)
    sys.modules["dalle_jax.train.tasks"] = types.ModuleType("tasks")
    sys.modules["dalle_jax.train.tasks"].make_task = type("Task", (SlowTask,), {"event": event})
    command.load_config = lambda path: tiny_config(**changes)
    code = command.main(argv)
    atexit._run_exitfuncs()  # as at the end of any process; those of multiprocessing end without
    sys.stderr.flush()
    os._exit(code)


CHANGES = {"steps": 24, "save_every": 4, "log_every": 1, "eval_every": 8, "sample_every": 12}
SHORT = ["--distributed.heartbeat-seconds", "10"]  # where a process is to be lost
BOUND = 240  # seconds until all must be gone: start, training, heartbeat, and much for a busy machine


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Job:
    """`count` processes with `devices` each, one training in `run`.

    event: WHAT:PROCESS:STEP, what one process does to itself when the batch of a step is read: a signal's name,
    `hang` or `raise`.
    """

    def __init__(self, run: Path, count: int, devices: int, event="none:-1:-1", flags=(), **changes):
        self.run = run
        run.parent.mkdir(exist_ok=True, parents=True)
        what, who, when = event.split(":")
        port, self.processes = free_port(), []
        self.logs = [run.with_name(f"{run.name}.{p}.log") for p in range(count)]
        for p, log in enumerate(self.logs):
            argv = ["config.py", "--run", str(run), *flags]
            if count > 1:
                argv += [
                    "--distributed.coordinator",
                    f"localhost:{port}",
                    "--distributed.processes",
                    str(count),
                ]
                argv += ["--distributed.process", str(p)]
            args = (log, devices, (what, int(who), int(when)), CHANGES | changes, argv)
            self.processes.append(CONTEXT.Process(target=train, args=args, daemon=True))
            self.processes[-1].start()

    def codes(self) -> list[int]:
        """Exit codes, once all have ended; None for one that has not in BOUND seconds."""
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

    def wait_for_step(self, step: int) -> None:
        file = self.run / "metrics.jsonl"
        for _ in range(30_000):
            if file.exists() and f'"step": {step},' in file.read_text():
                return
            assert all(p.is_alive() for p in self.processes), self.logs_text()
            time.sleep(0.01)
        raise AssertionError(f"no step {step}: {self.logs_text()}")


def series(run: Path) -> list[dict]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "timing"} for row in rows]


def assert_close(got: list[dict], want: list[dict]) -> None:
    """The same steps and figures; sums over devices may be taken in another order (relative 1e-5)."""
    assert [(r["step"], list(r)) for r in got] == [(r["step"], list(r)) for r in want]
    for g, w in zip(got, want, strict=True):
        for name in w:
            np.testing.assert_allclose(g[name], w[name], rtol=1e-5, atol=1e-6, err_msg=f"{name}, {g['step']}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One process, eight devices, nothing happens."""
    run = tmp_path_factory.mktemp("straight") / "run"
    config = tiny_config(run, **CHANGES)
    loop.run(config, FakeTask(config))
    return run


def same_weights(a: Path, b: Path) -> None:
    for x, y in zip(
        *(jax.tree.leaves(rundir.load_run(r, which="latest").params) for r in (a, b)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_two_processes_equal_one(tmp_path, straight):
    run = tmp_path / "run"
    job = Job(run, 2, 4)
    assert job.codes() == [0, 0], job.logs_text()
    assert_close(series(run), series(straight))
    same_weights(run, straight)
    assert "8 x cpu of 2 processes" in job.log(0)
    assert "loss" not in job.log(1)  # one process tells
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in straight.iterdir())
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_00000012.png", "step_00000024.png"]
    written = json.loads((run / "config.json").read_text())["distributed"]
    assert written["coordinator"] is written["processes"] is written["process"] is None


def test_a_lost_process_ends_the_others_and_fewer_go_on(tmp_path, straight):
    """Process 0 is the one that the others talk to: they notice at once, whatever the heartbeat."""
    run = tmp_path / "run"
    job = Job(run, 2, 4, "SIGKILL:0:15")
    first, second = job.codes()
    assert first == -signal.SIGKILL and second not in (0, None), job.logs_text()
    steps = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    assert steps[-1] in (8, 12)  # that of 12 may have been on its way
    config = tiny_config(run, **CHANGES)
    assert loop.run(config, FakeTask(config)).finished  # one process with eight devices
    assert_close(series(run), series(straight))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, straight, name):
    run = tmp_path / "run"
    job = Job(run, 2, 4, f"{name}:1:6", steps=400)
    assert job.codes() == [0, 0], job.logs_text()
    assert "stopped after step" in job.log(0)
    last = series(run)[-1]["step"]
    assert last < 400 and rundir.load_run(run, which="latest").step == last


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_with_a_message(tmp_path):
    job = Job(tmp_path / "run", 2, 4, "hang:1:6", ["--distributed.stall-seconds", "20"])
    codes = job.codes()
    assert codes[1] == 4 and codes[0] not in (0, None), job.logs_text()
    assert "process 1 of 2: nothing has moved for 20 s" in job.log(1)
    assert "it was reading the batch of step 7" in job.log(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_process_that_gives_no_sign_of_life_ends_the_others(tmp_path, name):
    job = Job(tmp_path / "run", 2, 4, f"{name}:1:6", SHORT)
    job.processes[0].join(BOUND)
    code = job.processes[0].exitcode
    job.kill()
    assert code not in (0, None), job.logs_text()


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path):
    job = Job(tmp_path / "run", 2, 4, "raise:1:6", SHORT)
    codes = job.codes()
    assert codes[1] == 1 and codes[0] not in (0, None), job.logs_text()
    assert "TypeError: planted" in job.log(1)


@pytest.mark.slow
def test_four_processes_equal_one_and_two_go_on(tmp_path, straight):
    """4 x 2 devices; kill -9 at a random step; restarted as 2 x 4 devices."""
    whole = tmp_path / "whole"
    job = Job(whole, 4, 2)
    assert job.codes() == [0] * 4, job.logs_text()
    assert_close(series(whole), series(straight))
    same_weights(whole, straight)

    run = tmp_path / "run"
    job = Job(run, 4, 2, flags=SHORT)
    job.wait_for_step(random.randint(4, 20))
    victim = random.randrange(4)
    job.processes[victim].kill()
    assert all(code not in (0, None) for code in job.codes()), job.logs_text()
    job = Job(run, 2, 4)
    assert job.codes() == [0, 0], job.logs_text()
    assert "goes on from step" in job.log(0)
    assert_close(series(run), series(straight))
    same_weights(run, straight)


@pytest.mark.slow
def test_twenty_random_kills(tmp_path):
    """Whatever the moment: every checkpoint can be read, and no save is lost but one that was on its way."""
    every = 4
    changes = {"steps": 4000, "save_every": every, "eval_every": 1000, "sample_every": 1000}
    run, lost, seconds = tmp_path / "run", [], []
    done = 0
    while len(lost) < 20:
        job = Job(run, 2, 4, flags=SHORT, **changes)
        try:
            job.wait_for_step(done + random.randint(1, 3 * every))
        except AssertionError:  # the machine stood still for the heartbeat's ten seconds: not our kill
            job.codes()
            continue
        time.sleep(random.random() * 0.2)
        victim = random.randrange(2)
        job.processes[victim].kill()
        begin = time.monotonic()
        codes = job.codes()
        seconds.append(time.monotonic() - begin)
        assert all(code not in (0, None) for code in codes), job.logs_text()
        steps = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
        for step in steps:
            rundir.load_run(run, which=step)
        last = series(run)[-1]["step"]
        done = steps[-1] if steps else 0
        lost.append(last - done)
        assert done >= last // every * every - every, (last, steps)
    print("steps lost per kill, saving every", every, ":", lost)
    print("seconds until all had ended:", [round(s, 1) for s in seconds])
    last = series(run)[-1]["step"]
    Job(run, 2, 4, f"SIGTERM:0:{last + 2}", **changes).codes()
    Job(tmp_path / "want", 1, 8, f"SIGTERM:0:{last}", **changes).codes()
    got, want = series(run), series(tmp_path / "want")
    rows = min(len(got), len(want))
    assert rows >= last
    assert_close(got[:rows], want[:rows])
