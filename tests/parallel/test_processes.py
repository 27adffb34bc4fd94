"""Several processes as one training: initialization, rows of each process, the common stop, and loss of a process."""

import os
import signal
import threading

import jax
import numpy as np
import pytest
from fake_task import FakeTask, tiny_config
from jobs import Job, assert_close, assert_same_params, only_process_0_logs, saved_steps, series, straight_run

from dalle_jax.config import DistributedConfig, MeshConfig
from dalle_jax.parallel import preemption, processes
from dalle_jax.parallel.devices import peak_flops
from dalle_jax.parallel.global_arrays import local_rows, make_global_batch
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.processes import initialize_distributed
from dalle_jax.parallel.sharding import batch_sharding
from dalle_jax.train import loop
from dalle_jax.train.metrics import read_metrics

# --- initialization --------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.fixture
def initialize_calls(monkeypatch):
    """The arguments of each call of jax.distributed.initialize; no environment of a cluster, no libtpu."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    return calls


def test_a_single_machine_does_not_initialize(initialize_calls, monkeypatch):
    initialize_distributed(DistributedConfig())
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    initialize_distributed(DistributedConfig(num_processes=1))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    initialize_distributed(DistributedConfig())
    assert initialize_calls == []


@pytest.mark.parametrize(
    ("env", "tpu"),
    [
        (SLURM, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, False),
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({}, True),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, False),
    ],
)
def test_a_cluster_is_detected_by_its_environment(initialize_calls, monkeypatch, env, tpu):
    if tpu:
        monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    initialize_distributed(DistributedConfig(heartbeat_timeout_seconds=7))
    ((args, named),) = initialize_calls
    assert args == (None, None, None) and named["cluster_detection_method"] is None
    assert named["heartbeat_timeout_seconds"] == 7


def test_flags_override_the_cluster(initialize_calls, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    initialize_distributed(DistributedConfig(coordinator_address="h:12", num_processes=3, process_id=2))
    ((args, named),) = initialize_calls
    assert args == ("h:12", 3, 2) and named["cluster_detection_method"] == "deactivate"


def test_an_unknown_cluster_is_an_error(initialize_calls, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match=r"find the processes of Open MPI.*--distributed\.coordinator-address HOST:PORT"
    ):
        initialize_distributed(DistributedConfig())
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    initialize_distributed(DistributedConfig())  # a TPU without a metadata server is one host


def test_no_connection_is_an_error(initialize_calls, monkeypatch):
    def time_out(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", time_out)
    with pytest.raises(
        OSError, match=r"\(h:12\) within 5 s, got: DEADLINE_EXCEEDED: Barrier timed out\.\. Check that"
    ):
        initialize_distributed(
            DistributedConfig(
                coordinator_address="h:12", num_processes=3, process_id=2, initialization_timeout_seconds=5
            )
        )


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({}, (0, 1)),
        (SLURM, (1, 2)),
        (SLURM | {"SLURM_NTASKS": "1"}, (0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, (3, 4)),
    ],
)
def test_process_index_and_count_without_initialization(initialize_calls, monkeypatch, env, want):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert processes.process_index_and_count() == want
    assert initialize_calls == []


def test_an_unknown_number_of_processes_is_an_error(initialize_calls, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "h")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    with pytest.raises(ValueError, match=r"only index 2 from Kubernetes.*--process and --processes"):
        processes.process_index_and_count()


# --- rows -----------------------------------------------------------------------------------------------


class PartialSharding:
    """A sharding of which only some devices belong to this process."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self.sharding.devices_indices_map(shape).items() if d in self.devices}


def test_local_rows_by_hand():
    """16 rows over data 2 x fsdp 2 (4 rows each), model 2: device (d, f, m) holds rows 4 (2 d + f)."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    sharding, grid = batch_sharding(mesh), mesh.devices.reshape(2, 2, 2)  # one slice
    for held, rows in (
        (grid[0], range(8)),
        (grid[:, 1], [*range(4, 8), *range(12, 16)]),  # not adjacent
        (grid[:, :, 0], range(16)),  # the model axis runs across processes: both read all rows
        (grid[1, 0, 1:], range(8, 12)),
    ):
        got = local_rows(PartialSharding(sharding, set(held.ravel())), 16)
        np.testing.assert_array_equal(got, list(rows))


def test_make_global_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    x = np.arange(16 * 3).reshape(16, 3)
    placed = make_global_batch(x, np.arange(16), 16, batch_sharding(mesh))
    np.testing.assert_array_equal(placed, x)
    assert placed.sharding == batch_sharding(mesh)


# --- peak, profile, watchdog ----------------------------------------------------------------------------


def test_peak_flops_of_the_data_sheets():
    for kind, peak in (
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None), ("cpu", None), ("TPU v7x", None),
    ):  # fmt: skip
        assert peak_flops(kind) == peak, kind


def test_mfu_is_model_flops_over_peak_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda kind: 1e6)
    monkeypatch.setattr(loop, "train_flops", lambda config: 4e3)
    config = tiny_config(tmp_path / "run", steps=2)
    loop.train(config, FakeTask(config))
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        if "timing" in row:
            want = 4e3 / (1e6 * 8) / row["timing"]["step_seconds"]
            assert row["timing"]["mfu"] == pytest.approx(want, rel=0.01, abs=1e-6)


def test_the_profile_has_the_configured_steps(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", steps=6, profile={"steps": "3:4"})
    loop.train(config, FakeTask(config))
    assert "profile of steps 3 to 4" in capsys.readouterr().err
    (file,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    step_numbers = {
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert step_numbers == {3, 4}


def test_watchdog_exits_after_a_stall_with_its_activity(monkeypatch, capfd):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    watchdog = preemption.Watchdog(0.2)
    watchdog.at("reading the batch of step 7")
    assert ended.wait(60)
    assert codes == [processes.PROCESS_LOST]
    message = capfd.readouterr().err
    assert "no progress for 0.2 s" in message and "while reading the batch of step 7" in message
    assert "test_processes.py" in message  # the stack of the main thread


# --- real processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return straight_run(tmp_path_factory.mktemp("straight") / "run")


def test_two_processes_equal_one(tmp_path, straight):
    run = tmp_path / "run"
    job = Job(run, 2, 4)
    assert job.codes() == [0, 0], job.logs_text()
    assert_close(series(run), series(straight))
    assert_same_params(run, straight)
    assert "8 x cpu of 2 processes" in job.log(0)
    only_process_0_logs(job)
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in straight.iterdir())
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_00000012.png", "step_00000024.png"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    """Step 7 carries the flag, and its metrics are read while step 8 runs. Step 4 was saved before."""
    run = tmp_path / "run"
    job = Job(run, 2, 4, "SIGTERM:1:6")
    assert job.codes() == [0, 0], job.logs_text()
    assert "stopped after step 8" in job.log(0), job.logs_text()
    assert series(run)[-1]["step"] == saved_steps(run)[-1] == 8


def test_loss_of_a_process_ends_the_others_and_fewer_processes_resume(tmp_path, straight):
    """Process 0 has the coordinator: the others detect its loss at once, whatever the heartbeat."""
    run = tmp_path / "run"
    job = Job(run, 2, 4, "SIGKILL:0:15")
    first, second = job.codes()
    assert first == -signal.SIGKILL and second not in (0, None), job.logs_text()
    assert saved_steps(run)[-1] in (8, 12)  # the save of step 12 may not have ended
    straight_run(run)  # one process with eight devices
    assert_close(series(run), series(straight))
