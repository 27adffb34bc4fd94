"""Tests of the end and the resumption of a training of several processes; slow, on real processes."""

import random
import time

import pytest
from jobs import (
    BOUND,
    HEARTBEAT,
    SHORT,
    Job,
    assert_close,
    assert_same_params,
    only_process_0_logs,
    saved_steps,
    series,
    straight_run,
    unfinished_saves,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return straight_run(tmp_path_factory.mktemp("straight") / "run")


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1])
def test_signals_during_a_save_stop_all(tmp_path, who):
    """With a save at every step, the signal arrives during one."""
    for step in range(3, 8):
        run = tmp_path / f"run{step}"
        job = Job(run, 2, 2, f"SIGINT:{who}:{step}", mesh={"data": 4, "fsdp": 1, "model": 1}, save_every=1)
        assert job.codes() == [0, 0], job.logs_text()
        assert f"stopped after step {step + 2}" in job.log(0), job.logs_text()
        assert saved_steps(run)[-1] == step + 2


def test_a_process_that_hangs_ends_all_with_a_message(tmp_path):
    job = Job(tmp_path / "run", 2, 4, "hang:1:6", ["--distributed.stall-timeout-seconds", "20"])
    codes = job.codes()
    assert codes[1] == 4 and codes[0] not in (0, None), job.logs_text()
    assert "process 1 of 2: no progress for 20 s" in job.log(1)
    assert "while reading the batch of step 7" in job.log(1)


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_process_without_heartbeat_ends_the_others(tmp_path, name):
    job = Job(tmp_path / "run", 2, 4, f"{name}:1:6", SHORT)
    job.processes[0].join(BOUND)
    code = job.processes[0].exitcode
    job.kill()
    assert code not in (0, None), job.logs_text()


def test_an_error_of_one_process_ends_all(tmp_path):
    job = Job(tmp_path / "run", 2, 4, "raise:1:6", SHORT)
    codes = job.codes()
    assert codes[1] == 1 and codes[0] not in (0, None), job.logs_text()
    assert "TypeError: planted" in job.log(1)


# --- resumes ------------------------------------------------------------------------

# Processes, devices of each, mesh.
STARTS = [
    (4, 2, {"slices": 1, "data": 2, "fsdp": 2, "model": 2}),
    (2, 4, {"slices": 2, "data": 1, "fsdp": 2, "model": 2}),
    (1, 8, {"slices": 1, "data": 1, "fsdp": 4, "model": 2}),
    (2, 2, {"slices": 4, "data": 1, "fsdp": 1, "model": 1}),
    (1, 1, {"slices": 1, "data": 1, "fsdp": 1, "model": 1}),
]


def test_four_processes_equal_one(tmp_path, straight):
    run = tmp_path / "run"
    job = Job(run, 4, 2)
    assert job.codes() == [0] * 4, job.logs_text()
    assert_close(series(run), series(straight))
    assert_same_params(run, straight)
    only_process_0_logs(job)


def test_other_processes_meshes_and_slices_resume(tmp_path):
    """4 x 2 devices, 2 x 4, 1 x 8, 2 x 2 and one, each another mesh or other slices, stopped by SIGTERM in between."""
    run, changes = tmp_path / "run", {"steps": 500, "eval_every": 50, "sample_every": 250, "save_every": 100}
    stops = []
    for n, (count, devices, mesh) in enumerate(STARTS):
        step = stops[-1] if stops else 0
        event = f"SIGTERM:{count - 1}:{step + 3}" if n + 1 < len(STARTS) else "none:-1:-1"
        job = Job(run, count, devices, event, mesh=mesh, **changes)
        assert job.codes() == [0] * count, job.logs_text()
        assert f"resuming from step {step}" in job.log(0) or not step
        stops.append(series(run)[-1]["step"])
    print("stopped after steps", stops)
    assert sorted(set(stops)) == stops and stops[-1] == 500  # each start trained some steps
    straight = straight_run(tmp_path / "straight", **changes)
    assert_close(series(run), series(straight))
    assert_same_params(run, straight)


def test_twenty_random_kills(tmp_path):
    """kill -9 of a random process at a random time; each start has other processes, mesh and slices.

    Every checkpoint can be read, none is missing except one whose save had not ended, the other processes end within
    the heartbeat, and the final metrics are those of an uninterrupted training.
    """
    every, kills, seed = 8, 20, random.randrange(10**6)
    rng = random.Random(seed)
    print("seed", seed)
    # The learning rate must not depend on `steps`, which follows from the kills.
    changes = {
        "steps": 10_000, "save_every": every, "eval_every": 50, "sample_every": 10_000,
        "optim": {"decay_steps": 1000},
    }  # fmt: skip
    run, last, newest = tmp_path / "run", 0, 0
    lost, during_save, seconds, by_themselves = [], 0, [], 0
    while len(lost) < kills:
        count, devices, mesh = STARTS[rng.randrange(len(STARTS) - 1)]
        job = Job(run, count, devices, flags=SHORT, mesh=mesh, **changes)
        if starting := len(lost) % 5 == 4:  # during the start: connecting, compiling, reading the checkpoint
            time.sleep(rng.random() * 3)
            killed = all(p.is_alive() for p in job.processes)
        else:
            killed = job.reaches(last + rng.randint(1, 3 * every))
            time.sleep(rng.random() * 0.2)
        victim = job.processes[rng.randrange(count)]
        victim.kill()
        begin = time.monotonic()
        codes = job.codes()
        took = time.monotonic() - begin
        assert all(code not in (0, None) for code in codes), job.logs_text()

        before, steps = (last, newest), saved_steps(run)
        last, newest = (series(run) or [{"step": 0}])[-1]["step"], steps[-1] if steps else 0
        due = last // every * every
        assert before[1] <= newest <= last
        if newest < due and last != before[0]:
            # The save of `due` had started, or was waiting for the end of the one before.
            missing = due - every if last == due and newest < due - every else due
            assert newest == missing - every and (missing in unfinished_saves(run) or missing == last), (
                last,
                steps,
            )
            during_save += missing != last
        if not killed:  # ended by itself, without CPU time until the heartbeat timeout
            by_themselves += 1
            assert by_themselves < kills, job.logs_text()
            continue
        seconds.append(took)
        lost.append(last - newest if last != before[0] else 0)
        print(
            f"kill {len(lost)}: {count} processes, {'starting' if starting else f'at {last}'}, newest {newest}"
        )
    print(f"saving every {every}; steps lost: {lost}; {during_save} kills during a save")
    print(f"seconds until all had ended: {[round(s, 1) for s in seconds]}; heartbeat {HEARTBEAT}")
    print("lives that ended by themselves:", by_themselves)

    changes["steps"] = last + 5
    count, devices, mesh = STARTS[0]
    job = Job(run, count, devices, mesh=mesh, **changes)
    assert job.codes() == [0] * count, job.logs_text()
    straight = straight_run(tmp_path / "straight", **changes)
    assert_close(series(run), series(straight))
    assert_same_params(run, straight)
