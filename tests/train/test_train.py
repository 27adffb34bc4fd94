"""The training loop: stop, kill, NaN and another mesh do not change the result."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_task import FakeTask, tiny_config

from dalle_jax.checkpoint import run_dir as rundir
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.lock import run_lock
from dalle_jax.cli import main, train
from dalle_jax.config import MeshConfig, TrainConfig
from dalle_jax.config.files import load_config
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.train import loop
from dalle_jax.train.metrics import MetricsLog, read_metrics
from dalle_jax.train.optim import make_optimizer, update_ema
from dalle_jax.train.state import INIT, abstract_state, init_state, make_step, param_shapes, run_key

pytestmark = pytest.mark.usefixtures("fake_models")

MESHES = [
    {"data": 8, "fsdp": 1, "model": 1},
    {"data": 2, "fsdp": 2, "model": 2},
    {"data": 1, "fsdp": 4, "model": 2},
]


def metric_rows(run) -> list[dict]:
    """Return the rows of metrics.jsonl without their timing."""
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "timing"} for row in rows]


def assert_equal(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def snapshot(run):
    """Return the content of every file below `run`."""
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(Path(run).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run of ten steps."""
    run = tmp_path_factory.mktemp("straight") / "run"
    config = tiny_config(run)
    result = loop.train(config, FakeTask(config))
    return run, result


# --- the files of a run -----------------------------------------------------------------------------------


def test_a_run_writes_its_files(straight):
    run, result = straight
    assert result.finished and result.step == 10 and int(result.state.step) == 10
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "config.json", "events", "metrics.jsonl", "samples", "text_tokenizer.model",
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "8"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_00000005.png", "step_00000010.png"]
    rows = metric_rows(run)
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 11))
    assert [r["step"] for r in rows if "eval_loss" in r] == [4, 8, 10]
    assert list(rows[0]) == ["step", "loss", "error", "grad_norm", "jitter", "learning_rate"]
    assert [r["learning_rate"] for r in rows[:2]] == [0.0, pytest.approx(0.01)]
    assert result.metrics["eval_loss"] == rows[-1]["eval_loss"] < rows[4]["eval_loss"]
    timing = read_metrics(run / "metrics.jsonl")[0]["timing"]
    assert timing["tokens_per_s"] == pytest.approx(4 * timing["rows_per_s"], rel=1e-3)
    assert rundir.read_run_config(run) == tiny_config(run)


def test_metrics_and_averages_by_hand(straight):
    """Losses and averaged parameters equal those of a plain loop on one device."""
    run, result = straight
    config = tiny_config(run)
    task = FakeTask(config)
    params = task.init(run_key(0, INIT))
    tx = make_optimizer(config.optim, config.steps, params)
    opt_state, ema, batches, losses = tx.init(params), params, task.batches(0), []
    grads_of = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    for step in range(config.steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        (loss, _), grads = grads_of(params, task.frozen, next(batches), key, step)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        ema = update_ema(ema, params, config.optim, step + 1)
        losses.append(float(loss))
    np.testing.assert_allclose([r["loss"] for r in metric_rows(run) if "loss" in r], losses, rtol=1e-5)
    for got, want in ((result.state.params, params), (result.state.ema, ema)):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)


def test_the_step_compiles_once(tmp_path):
    config = tiny_config(tmp_path / "run")
    task = FakeTask(config)
    loop.train(config, task)
    assert task.traces == 1


def test_a_finished_run_is_not_changed(straight, capsys):
    run, result = straight
    before = snapshot(run)
    again = loop.train(tiny_config(run), FakeTask(tiny_config(run)))
    assert again.finished and "nothing to do" in capsys.readouterr().err
    assert_equal(again.state, result.state)
    assert snapshot(run) == before


def test_tensorboard_events_can_be_read(straight):
    from tensorboardX.proto.event_pb2 import Event

    run, _ = straight
    (file,) = (run / "events").iterdir()
    data, tags = file.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append(event.step)
    assert (
        tags["loss"] == list(range(1, 11)) and tags["eval_loss"] == [4, 8, 10] and tags["samples"] == [5, 10]
    )


# --- stop and resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_next_run_resumes(tmp_path, straight, number):
    run = tmp_path / "run"
    config = tiny_config(run)
    before = signal.getsignal(number)
    task = FakeTask(config, at={7: lambda: os.kill(os.getpid(), number)})
    stopped = loop.train(config, task)
    assert not stopped.finished and stopped.step == 7
    assert signal.getsignal(number) is before
    assert load_run(run, step="latest").step == 7

    result = loop.train(config, FakeTask(config))
    assert result.finished
    assert_equal(result.state, straight[1].state)
    assert metric_rows(run) == metric_rows(straight[0])


def test_only_one_process_trains_a_run(tmp_path, monkeypatch):
    """A second training is refused without side effects; a lock that is released in time is waited for."""
    monkeypatch.setattr(loop, "run_lock", functools.partial(run_lock, timeout=0))
    run = tmp_path / "run"
    config = tiny_config(run)
    with run_lock(str(run)):
        with pytest.raises(ValueError, match=r"no other training in .*run, got one\. Wait for it, stop it"):
            loop.train(config, FakeTask(config))
        assert list(run.iterdir()) == []
    assert not run.exists()  # nothing was written
    run.mkdir()
    lock = run_lock(str(run))
    lock.__enter__()
    threading.Timer(0.3, lock.__exit__, (None, None, None)).start()
    with run_lock(str(run), timeout=30):
        assert run.is_dir()
    assert run.is_dir()  # it existed before


@pytest.fixture
def default_sigint():
    """SIGINT raises KeyboardInterrupt, even if the suite runs in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_aborts(tmp_path, default_sigint):
    config = tiny_config(tmp_path / "run")

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, FakeTask(config, at={6: twice}))
    assert load_run(tmp_path / "run").step == 4


def test_rows_after_the_checkpoint_are_dropped(tmp_path, straight):
    """A kill leaves rows after the last checkpoint, the last one incomplete."""
    run = tmp_path / "run"
    config = tiny_config(run)
    loop.train(config, FakeTask(config, at={6: lambda: os.kill(os.getpid(), signal.SIGINT)}))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert loop.train(config, FakeTask(config)).finished
    assert metric_rows(run) == metric_rows(straight[0])
    assert not [p for p in run.rglob("*.tmp")]


def test_invalid_metrics_name_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: Expected a row of metrics, got"):
        MetricsLog(tmp_path, 5)


def test_non_finite_numbers_become_null(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 0.1, "eval": float("nan"), "psnr": float("inf"), "exact": float(np.float32(1 / 3))})
    log.close()
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row == {"step": 1, "loss": 0.1, "eval": None, "psnr": None, "exact": float(np.float32(1 / 3))}


COMMAND = """
import sys, time
sys.path.insert(0, sys.argv[1])
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from fake_task import FakeTask
from dalle_jax.cli import main

class Slow(FakeTask):
    def batches(self, start, rows=None):
        for batch in super().batches(start, rows):
            time.sleep(0.02)
            yield batch

sys.modules["dalle_jax.train.tasks"] = type(sys)("tasks")
sys.modules["dalle_jax.train.tasks"].make_task = Slow
sys.exit(main(["train", *sys.argv[2:]]))
"""

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from fake_task import tiny_config
config = tiny_config(steps=60, save_every=5, log_every=2, eval_every=10, sample_every=30)
"""


def start_command(tmp_path, *args):
    tests = Path(__file__).parents[1]
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(tests=str(tests)))
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tests), str(file), *map(str, args)],
        stderr=subprocess.PIPE, text=True, cwd=tests.parent,
    )  # fmt: skip


def wait_for_rows(run, count, process):
    """Wait until metrics.jsonl has `count` lines."""
    file = Path(run) / "metrics.jsonl"
    for _ in range(6000):
        if file.exists() and file.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("no rows after a minute")


@pytest.fixture(scope="module")
def straight_command(tmp_path_factory):
    path = tmp_path_factory.mktemp("command")
    process = start_command(path, "--run", path / "run")
    assert process.wait(120) == 0, process.stderr.read()
    return path / "run"


def test_kill_and_resume_equals_an_uninterrupted_run(tmp_path, straight_command):
    run = tmp_path / "run"
    process = start_command(tmp_path, "--run", run)
    wait_for_rows(run, random.randint(2, 24), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process = start_command(tmp_path, "--run", run)
    assert process.wait(120) == 0, process.stderr.read()
    assert metric_rows(run) == metric_rows(straight_command)
    for which in (60, 55):
        a, b = (load_run(r, step=which, ema=False) for r in (run, straight_command))
        assert_equal(a.params, b.params)
    grids = [(r / "samples" / "step_00000060.png").read_bytes() for r in (run, straight_command)]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_exits_0_with_a_checkpoint(tmp_path, number):
    run = tmp_path / "run"
    process = start_command(tmp_path, "--run", run)
    wait_for_rows(run, 3, process)
    process.send_signal(number)
    assert process.wait(60) == 0, process.stderr.read()
    text = process.stderr.read()
    assert f"{number.name}: finishing the step" in text and "the same command resumes from there" in text
    assert f"stopped after step {load_run(run, step='latest').step};" in text


# --- NaN ------------------------------------------------------------------------------------------------


def test_nan_stops_and_leaves_the_last_checkpoint(tmp_path):
    run = tmp_path / "run"
    config = tiny_config(run, log_every=100)
    # The batch of index 7 is that of step 8, where a checkpoint is due.
    with pytest.raises(loop.NonFiniteError, match=r"step 8: loss nan.*last checkpoint is of step 4"):
        loop.train(config, FakeTask(config, nan_at=7))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["4"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_run(run).params))
    assert loop.train(config, FakeTask(config)).finished  # the batch has no NaN now


def test_nan_does_not_change_the_state():
    config = tiny_config()
    task = FakeTask(config, nan_at=0)
    mesh = make_mesh(config.mesh)
    tx = make_optimizer(config.optim, config.steps, param_shapes(task))
    state = init_state(task, tx, mesh)
    before = jax.device_get(state)
    with jax.set_mesh(mesh):
        state, metrics = make_step(task, tx, config, mesh)(state, task.frozen, next(task.batches(0)))
    assert not metrics["finite"]
    assert_equal(state, before)


# --- any mesh -----------------------------------------------------------------------------


def test_init_is_equal_on_any_mesh():
    states = []
    for sizes in MESHES:
        config = tiny_config(mesh=sizes)
        task = FakeTask(config)
        tx = make_optimizer(config.optim, config.steps, param_shapes(task))
        states.append(init_state(task, tx, make_mesh(config.mesh)))
    states.append(init_state(task, tx, make_mesh(MeshConfig(), jax.devices()[:1])))
    for state in states[1:]:
        assert_equal(state, states[0])


def test_moments_and_averages_have_the_sharding_of_their_parameters():
    config = tiny_config()
    task = FakeTask(config)
    tx = make_optimizer(config.optim, config.steps, param_shapes(task))
    mesh = make_mesh(config.mesh)
    abstract, state = abstract_state(task, tx, mesh), init_state(task, tx, mesh)
    kernel = state.params["text_head"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4)  # split over fsdp and model
    alike = [x for x in jax.tree.leaves(state) if x.shape == kernel.shape]
    assert len(alike) == 4 and all(x.sharding == kernel.sharding for x in alike)
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), state
    )


def train_steps(config, devices=None, count=4):
    task = FakeTask(config)
    mesh = make_mesh(config.mesh, devices)
    tx = make_optimizer(config.optim, config.steps, param_shapes(task))
    state, losses = init_state(task, tx, mesh), []
    with jax.set_mesh(mesh):
        step = make_step(task, tx, config, mesh)
        for _, batch in zip(range(count), task.batches(0), strict=False):
            state, metrics = step(state, task.frozen, batch)
            losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


def test_8_devices_equal_1():
    """Equal up to the order of sums; Adam divides by small numbers, so the tolerance is 1e-4."""
    one, one_losses = train_steps(tiny_config(mesh={"data": 1, "fsdp": 1, "model": 1}), jax.devices()[:1])
    for sizes in MESHES:
        many, losses = train_steps(tiny_config(mesh=sizes))
        np.testing.assert_allclose(losses, one_losses, rtol=1e-6)
        for x, y in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)


def test_accumulation_equals_one_batch():
    """Without random terms in the loss, because each microbatch has a key of its own."""
    results = []
    for pieces in (1, 4):
        config = tiny_config(optim={"grad_accum_steps": pieces}, mesh={"data": 2, "fsdp": 2, "model": 2})
        task = FakeTask(config, noise=0.0)
        mesh = make_mesh(config.mesh)
        tx = make_optimizer(config.optim, config.steps, param_shapes(task))
        state = init_state(task, tx, mesh)
        with jax.set_mesh(mesh):
            step = make_step(task, tx, config, mesh)
            for _, batch in zip(range(3), task.batches(0), strict=False):
                state, metrics = step(state, task.frozen, batch)
        results.append((jax.device_get(state), jax.device_get(metrics)))
    for x, y in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)


def test_a_run_resumes_on_another_mesh(tmp_path, straight):
    run = tmp_path / "run"
    config = tiny_config(run)
    loop.train(config, FakeTask(config, at={5: lambda: os.kill(os.getpid(), signal.SIGINT)}))
    other = tiny_config(run, mesh={"data": 8, "fsdp": 1, "model": 1})
    assert loop.train(other, FakeTask(other)).finished
    want = [r["loss"] for r in metric_rows(straight[0]) if "loss" in r]
    np.testing.assert_allclose([r["loss"] for r in metric_rows(run) if "loss" in r], want, rtol=1e-5)
    assert rundir.read_run_config(run).mesh.data == 8


def test_without_averaging_and_without_clipping(tmp_path):
    config = tiny_config(tmp_path / "run", optim={"ema_decay": 0.0, "clip_norm": 0.0}, steps=5)
    result = loop.train(config, FakeTask(config))
    assert result.state.ema == {}
    longer = tiny_config(tmp_path / "run", optim={"ema_decay": 0.0, "clip_norm": 0.0}, steps=6)
    assert loop.train(longer, FakeTask(longer)).finished
    assert_equal(load_run(tmp_path / "run", step=5).params, result.state.params)


# --- errors before anything is written -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"batch_size": 6}}, r"Expected data.batch_size divisible by the 4 devices .*, got 6"),
        ({"optim": {"grad_accum_steps": 8}}, r"in 8 microbatches of 2 rows .* Use a multiple of 32"),
        ({"mesh": {"data": 3}}, r"got data=3"),
        ({"run": ""}, "Use --run DIR"),
    ],
)
def test_mismatched_batches_and_meshes_are_refused(tmp_path, changes, message):
    config = tiny_config(**{"run": tmp_path / "run", **changes})
    with pytest.raises(ValueError, match=message):
        loop.train(config, FakeTask(config))
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused(straight):
    run, _ = straight
    before = snapshot(run)
    other = tiny_config(run, seed=1, optim={"learning_rate": 0.5}, steps=99, data={"num_threads": 7})
    with pytest.raises(ValueError) as error:
        loop.train(other, FakeTask(other))
    assert str(error.value).splitlines()[1:3] == [
        "  optim.learning_rate: run has 0.02, command gives 0.5",
        "  seed: run has 0, command gives 1",
    ]
    assert "steps" not in str(error.value) and "num_threads" not in str(error.value)
    assert snapshot(run) == before


def test_another_stage_or_content_is_refused(straight, tmp_path):
    from dalle_jax.config import DalleConfig

    run, _ = straight
    dalle = TrainConfig(model=DalleConfig(dim=8, heads=2, layers=1), run=str(run))
    with pytest.raises(ValueError, match="stage: run has dvae, command gives dalle"):
        rundir.open_run_dir(dalle)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"an empty directory or a run, got .*notes\.txt"):
        rundir.open_run_dir(tiny_config(tmp_path))
    with pytest.raises(ValueError, match="got the file"):
        rundir.open_run_dir(tiny_config(tmp_path / "notes.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_preparation_leaves_no_files(tmp_path):
    class NoData(FakeTask):
        def prepare(self, run_dir):
            raise FileNotFoundError("no tar file there")

    config = tiny_config(tmp_path / "run")
    for made in (False, True):
        with pytest.raises(FileNotFoundError, match="no tar"):
            loop.train(config, NoData(config))
        assert (tmp_path / "run").exists() == made and not list((tmp_path / "run").glob("*"))
        (tmp_path / "run").mkdir(exist_ok=True)


def test_a_run_without_checkpoint_may_be_deleted(tmp_path):
    rundir.open_run_dir(tiny_config(tmp_path / "run"))
    with pytest.raises(ValueError, match="delete that directory, which has no checkpoint yet"):
        rundir.open_run_dir(tiny_config(tmp_path / "run", seed=5))


def test_some_fields_may_change_and_are_stored(tmp_path):
    run = tmp_path / "run"
    rundir.open_run_dir(tiny_config(run))
    assert rundir.open_run_dir(tiny_config(run, steps=77, max_checkpoints=9)) == run
    assert rundir.read_run_config(run).steps == 77
    assert [p.name for p in run.iterdir()] == ["config.json"]


# --- command line ---------------------------------------------------------------------------------------


def config_file(tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


SMALL = """
    from dalle_jax.config import DVAEConfig, TrainConfig
    config = TrainConfig(model=DVAEConfig(image_size=8, groups=1, width=4, decoder_width=4, vocab=8), steps=3)
"""


def test_flags_override_the_configuration(tmp_path):
    file = config_file(tmp_path, SMALL)
    config = train.parse_train_args(
        [file, "--run", "x", "--optim.learning-rate", "0.5", "--model.vocab", "16"]
    ).config
    assert (config.run, config.optim.learning_rate, config.model.vocab, config.steps) == ("x", 0.5, 16, 3)
    assert train.parse_train_args([file]).config == load_config(file)


def test_command_line_errors(tmp_path, capsys):
    file = config_file(tmp_path, SMALL)
    assert main(["train", file, "--model.vocabb", "3"]) == 2
    assert "model.vocab" in capsys.readouterr().err
    assert main(["train"]) == 2 and main(["train", "--run", "x"]) == 2
    assert main(["train", "--help"]) == 0
    assert "usage: dalle-jax train CONFIG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        (None, [], "Expected a configuration file or name"),
        ("x = 1", [], "define a `config` of type TrainConfig, got none"),
        ("config = 3", [], "define a `config` of type TrainConfig, got type int"),
        ("import nothing_here\n", [], r"config.py:1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("config = (\n", [], "SyntaxError"),
        (SMALL, [], "Use --run DIR"),
        (
            SMALL,
            ["--run", "x", "--data.batch-size", "7", "--optim.grad-accum-steps", "2"],
            "divisible by optim.grad_accum_steps 2, got 7",
        ),
        (
            SMALL,
            ["--run", "x", "--data.batch-size", "9"],
            "Expected data.batch_size divisible by the 8 devices",
        ),
    ],
)
def test_each_bad_input_is_one_message_and_exit_1(tmp_path, capsys, monkeypatch, text, args, message):
    import re
    import types

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "dalle_jax.train.tasks", types.SimpleNamespace(make_task=FakeTask))
    file = str(tmp_path / "missing.py") if text is None else config_file(tmp_path, text)
    assert main(["train", file, *args]) in (1, 2)
    err = capsys.readouterr().err
    assert re.search(message, " ".join(err.split())), err
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_nan_exits_3(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "dalle_jax.train.tasks", type(sys)("tasks"))
    sys.modules["dalle_jax.train.tasks"].make_task = lambda config: FakeTask(config, nan_at=1)
    config = tiny_config(tmp_path / "run")
    monkeypatch.setattr(train, "load_config", lambda path: config)
    assert main(["train", "config.py"]) == 3
    assert "error: step 2: loss nan" in capsys.readouterr().err


def test_train_py_is_this_command(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "train.py"), str(tmp_path / "missing.py")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "train.py: error: Expected a configuration file" in done.stderr, (
        done.stderr
    )
