"""What ends a training of several processes, and what it is started again as: all of it slow, on real processes."""

import random
import time

import pytest
from jobs import (
    BOUND,
    HEARTBEAT,
    SHORT,
    Job,
    assert_close,
    begun_saves,
    same_weights,
    saved_steps,
    series,
    straight_run,
    told_by_first_alone,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return straight_run(tmp_path_factory.mktemp("straight") / "run")


# --- how it ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1])
def test_signals_beside_a_save_stop_all(tmp_path, who):
    """A save is on its way at every step, so whatever Orbax does then is beside the signal."""
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
def test_a_process_that_gives_no_sign_of_life_ends_the_others(tmp_path, name):
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


# --- what it is started again as ------------------------------------------------------------------------

# Processes, devices of each, mesh.
LIVES = [
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
    same_weights(run, straight)
    told_by_first_alone(job)


def test_other_processes_meshes_and_slices_go_on(tmp_path):
    """4 x 2 devices, 2 x 4, 1 x 8, 2 x 2 and one, each another mesh or other slices, stopped by SIGTERM in between."""
    run, changes = tmp_path / "run", {"steps": 500, "eval_every": 50, "sample_every": 250, "save_every": 100}
    stops = []
    for n, (count, devices, mesh) in enumerate(LIVES):
        begun = stops[-1] if stops else 0
        event = f"SIGTERM:{count - 1}:{begun + 3}" if n + 1 < len(LIVES) else "none:-1:-1"
        job = Job(run, count, devices, event, mesh=mesh, **changes)
        assert job.codes() == [0] * count, job.logs_text()
        assert f"resuming from step {begun}" in job.log(0) or not begun
        stops.append(series(run)[-1]["step"])
    print("stopped after steps", stops)
    assert sorted(set(stops)) == stops and stops[-1] == 500  # each life had its part
    straight = straight_run(tmp_path / "straight", **changes)
    assert_close(series(run), series(straight))
    same_weights(run, straight)


def test_twenty_random_kills(tmp_path):
    """kill -9 of a random process, at a random moment, each life of other processes, mesh and slices.

    Whatever the moment: every checkpoint can be read, none is missing but one whose save had not ended, the others
    end within the heartbeat; and the figures in the end are those of a training that nothing happened to.
    """
    every, kills, seed = 8, 20, random.randrange(10**6)
    rng = random.Random(seed)
    print("seed", seed)
    # The rate must not depend on `steps`, which here is what the kills make it.
    changes = {
        "steps": 10_000, "save_every": every, "eval_every": 50, "sample_every": 10_000,
        "optim": {"decay_steps": 1000},
    }  # fmt: skip
    run, last, newest = tmp_path / "run", 0, 0
    lost, begun, seconds, by_themselves = [], 0, [], 0
    while len(lost) < kills:
        count, devices, mesh = LIVES[rng.randrange(len(LIVES) - 1)]
        job = Job(run, count, devices, flags=SHORT, mesh=mesh, **changes)
        if starting := len(lost) % 5 == 4:  # while it starts: joining, compiling, reading the checkpoint
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
            # The save of `due` had begun; or not even that, as it waits for the end of the one before.
            missing = due - every if last == due and newest < due - every else due
            assert newest == missing - every and (missing in begun_saves(run) or missing == last), (
                last,
                steps,
            )
            begun += missing != last
        if not killed:  # starved until the heartbeat was over; it, too, lost nothing, but was not our kill
            by_themselves += 1
            assert by_themselves < kills, job.logs_text()
            continue
        seconds.append(took)
        lost.append(last - newest if last != before[0] else 0)
        print(
            f"kill {len(lost)}: {count} processes, {'starting' if starting else f'at {last}'}, newest {newest}"
        )
    print(f"saving every {every}; steps lost: {lost}; {begun} times a save was on its way")
    print(f"seconds until all had ended: {[round(s, 1) for s in seconds]}; heartbeat {HEARTBEAT}")
    print("lives that ended by themselves:", by_themselves)

    changes["steps"] = last + 5
    count, devices, mesh = LIVES[0]
    job = Job(run, count, devices, mesh=mesh, **changes)
    assert job.codes() == [0] * count, job.logs_text()
    straight = straight_run(tmp_path / "straight", **changes)
    assert_close(series(run), series(straight))
    same_weights(run, straight)
