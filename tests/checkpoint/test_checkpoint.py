"""Tests of checkpoints: retention, restoring on another mesh, and failures of the disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fake_task import FakeTask, tiny_config
from orbax.checkpoint import v1 as ocp

from dalle_jax.checkpoint.export import write_run
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.checkpoint.params_file import params_fingerprint
from dalle_jax.config import MeshConfig
from dalle_jax.models import tokenizer
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.train import loop
from dalle_jax.train.optim import make_optimizer
from dalle_jax.train.state import abstract_state, init_state, param_shapes

pytestmark = pytest.mark.usefixtures("fake_models")


def leaves_equal(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def setup(**mesh):
    config = tiny_config(mesh=mesh) if mesh else tiny_config()
    task = FakeTask(config)
    return task, make_optimizer(config.optim, config.steps, param_shapes(task)), make_mesh(config.mesh)


def one_array(value, rows=4):
    return {"a": {"kernel": jnp.full((rows, 2), value, jnp.float32)}}


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_the_last_and_the_best_checkpoint_remain(tmp_path):
    scores = {1: 5.0, 2: 1.0, 3: None, 4: float("nan"), 5: 9.0, 6: 3.0}
    checkpoints = CheckpointManager(tmp_path, keep=2, best=("eval_loss", "min"))
    for step, score in scores.items():
        checkpoints.save(step, one_array(step), None if score is None else {"eval_loss": score, "other": 0.0})
    checkpoints.close()
    again = CheckpointManager(tmp_path)
    assert again.steps == [2, 5, 6] and again.latest == 6 and again.best == 2
    again.close()

    most = CheckpointManager(tmp_path / "max", keep=1, best=("right", "max"))
    for step, score in enumerate([0.1, 0.7, 0.7, 0.2]):
        most.save(step, one_array(step), {"right": score})
    most.wait()
    assert most.steps == [2, 3] and most.best == 2  # the later of two equal losses
    most.close()


def test_restores_on_another_mesh(tmp_path):
    task, tx, mesh = setup(data=2, fsdp=2, model=2)
    state = init_state(task, tx, mesh)
    checkpoints = CheckpointManager(tmp_path, keep=1)
    checkpoints.save(0, state)
    checkpoints.wait()
    for sizes in ({"data": 1, "fsdp": 4, "model": 2}, {"data": 8, "fsdp": 1, "model": 1}):
        _, _, other = setup(**sizes)
        abstract = abstract_state(task, tx, other)
        back = checkpoints.load(0, abstract)
        assert type(back) is type(state) and jax.tree.structure(back) == jax.tree.structure(state)
        leaves_equal(back, state)
        for leaf, want in zip(jax.tree.leaves(back), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding == want.sharding
    checkpoints.close()


def test_an_error_names_the_leaf_that_does_not_fit(tmp_path):
    task, tx, mesh = setup()
    checkpoints = CheckpointManager(tmp_path, keep=1)
    state = init_state(task, tx, mesh)
    checkpoints.save(3, state)
    checkpoints.wait()
    abstract = abstract_state(task, tx, mesh)
    kernel = abstract.params["text_head"]["kernel"]

    def params(**head):
        return abstract._replace(params={"text_head": abstract.params["text_head"] | head})

    wide = jax.ShapeDtypeStruct((4, 16), kernel.dtype, sharding=kernel.sharding)
    with pytest.raises(
        ValueError, match=r"params/text_head/kernel: the checkpoint has float32 \(4, 8\), .* \(4, 16\)"
    ):
        checkpoints.load(3, params(kernel=wide))
    with pytest.raises(ValueError, match=r"params/text_head/gain: not in the checkpoint"):
        checkpoints.load(3, params(gain=kernel))
    with pytest.raises(ValueError, match=r"ema/text_head/bias: only in the checkpoint"):
        checkpoints.load(3, abstract._replace(ema={"text_head": {"kernel": kernel}}))
    with pytest.raises(FileNotFoundError, match=r"checkpoints in .*, got 4"):
        checkpoints.load(4, abstract)
    leaves_equal(checkpoints.load(3, {"ema": abstract.ema}, partial=True)["ema"], state.ema)
    checkpoints.close()


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory):
    run = tmp_path_factory.mktemp("eight") / "run"
    config = tiny_config(run, steps=8)
    loop.train(config, FakeTask(config))
    return run


def damage_truncate(path: Path):
    for file in path.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def damage_data(path: Path):
    biggest = max((f for f in path.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(biggest, biggest.stat().st_size // 2)


def damage_empty(path: Path):
    shutil.rmtree(path)
    path.mkdir()


def damage_manifest(path: Path):
    (path / "state" / "manifest.ocdbt").unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_data, damage_empty, damage_manifest])
def test_damaged_latest_checkpoint_stops_the_run(tmp_path, eight_steps, damage):
    run = shutil.copytree(eight_steps, tmp_path / "run")
    damage(run / "checkpoints" / "8")
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    longer = tiny_config(run, steps=10)
    with pytest.raises(
        OSError, match=r"checkpoints/8 cannot be read.*Delete that directory to resume from step 4"
    ):
        loop.train(longer, FakeTask(longer))
    assert sorted(p.relative_to(run) for p in run.rglob("*")) == before
    shutil.rmtree(run / "checkpoints" / "8")
    assert loop.train(longer, FakeTask(longer)).finished


def test_half_written_checkpoint_is_ignored(tmp_path, eight_steps):
    run = shutil.copytree(eight_steps, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "8", run / "checkpoints" / "9.orbax-checkpoint-tmp")
    assert load_run(run).step == 8
    assert (run / "checkpoints" / "9.orbax-checkpoint-tmp").exists()  # loading deletes no files
    longer = tiny_config(run, steps=10)
    assert loop.train(longer, FakeTask(longer)).step == 10
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "8"]


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from fake_task import FakeTask, tiny_config
from dalle_jax.cli import main
from dalle_jax.cli import train as command
from dalle_jax.train import loop
rare = {"log_every": 100, "eval_every": 100, "sample_every": 100, "save_every": 2}
config = tiny_config(sys.argv[2], steps=4, **rare)
loop.train(config, FakeTask(config))

class Big(FakeTask):
    def batches(self, start, rows=None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
        return super().batches(start, rows)

sys.modules["dalle_jax.train.tasks"] = type(sys)("tasks")
sys.modules["dalle_jax.train.tasks"].make_task = Big
command.load_config = lambda path: tiny_config(sys.argv[2], steps=8, **rare)
sys.exit(main(["train", "config.py"]))
"""


def test_an_unfinished_deletion_leaves_no_checkpoint(tmp_path, monkeypatch):
    """After a kill during a deletion the directory has some of its files and no longer a number as its name."""

    def half(path):
        (path / "_CHECKPOINT_METADATA").unlink()
        raise OSError("killed")

    checkpoints = CheckpointManager(tmp_path, keep=1)
    checkpoints.save(1, one_array(1))
    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(tmp_path)), "rmtree", half)
        checkpoints.save(2, one_array(2))
        with pytest.raises(OSError, match=r"cannot delete the checkpoint .*/1\.deleted: killed"):
            checkpoints.wait()
    checkpoints.close()
    assert len(list(tmp_path.iterdir())) == 2 and CheckpointManager(tmp_path).steps == [2]
    CheckpointManager(tmp_path, keep=1).close()
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_full_disk_leaves_the_earlier_checkpoints(tmp_path):
    """A limit on the size of files replaces a full disk: the first file of the checkpoint does not fit."""
    run = tmp_path / "run"
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tests, str(run), "1000"],
        capture_output=True, text=True, timeout=120, cwd=tests + "/..",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "error: cannot save the checkpoint of step 6" in done.stderr, done.stderr
    assert "intact earlier steps: 2, 4)" in done.stderr and "File too large" in done.stderr, done.stderr
    assert load_run(run).step == 4
    config = tiny_config(run, steps=8, log_every=100)
    assert loop.train(config, FakeTask(config)).finished


def test_a_failed_save_stops_the_run(tmp_path, monkeypatch):
    class Failed:
        def result(self, timeout=None):
            raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    config = tiny_config(run, steps=10)
    real = ocp.training.Checkpointer.save_async

    def save_async(self, step, *args, **kwargs):
        return Failed() if step == 8 else real(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.training.Checkpointer, "save_async", save_async)
        with pytest.raises(OSError, match=r"step 8.*No space left on device.*intact earlier steps: 4"):
            loop.train(config, FakeTask(config))
    assert load_run(run).step == 4


def test_an_unwritable_run_directory_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_config(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="cannot make the run directory"):
        loop.train(config, FakeTask(config))
    if Path("/proc/self").exists():
        config = tiny_config("/proc/run")
        with pytest.raises(OSError, match="cannot make the run directory /proc/run"):
            loop.train(config, FakeTask(config))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_config(run)
    return run, loop.train(config, FakeTask(config)).state


def test_load_run_takes_what_is_asked_for(trained):
    run, state = trained
    best = load_run(run)
    assert best.step == 10 and best.config.steps == 10 and best.path == run
    leaves_equal(best.params, state.ema)
    leaves_equal(load_run(run, step="latest", ema=False).params, state.params)
    assert load_run(run, step=8).step == 8
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    spread = load_run(run, kind="dvae", mesh=mesh).params
    leaves_equal(spread, state.ema)
    assert spread["text_head"]["kernel"].sharding == state.ema["text_head"]["kernel"].sharding


def test_written_run_is_the_same_model(tmp_path):
    config = tiny_config(tmp_path / "run")
    params = tokenizer.init(config.model, jax.random.key(0))
    write_run(tmp_path / "frozen", config, params, 7)
    run = load_run(tmp_path / "frozen")
    assert (run.config, run.step) == (config, 7)
    leaves_equal(run.params, params)
    name = params_fingerprint(config.model, params)
    assert name == params_fingerprint(config.model, run.params) and len(name) == 16
    assert params_fingerprint(config.model, jax.tree.map(lambda x: x.at[-1].add(1e-6), params)) != name
    (tmp_path / "frozen" / "config.json").unlink()  # as if killed before the end
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        load_run(tmp_path / "frozen")


def test_invalid_arguments_of_load_run_are_rejected(trained, tmp_path):
    run, _ = trained
    with pytest.raises(ValueError, match=r"a run of stage dalle, got .* of stage dvae"):
        load_run(run, kind="dalle")
    with pytest.raises(FileNotFoundError, match="Expected a run directory"):
        load_run(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Expected a step of .*, the checkpoints in .*, got 5"):
        load_run(run, step=5)
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Expected a checkpoint in .*, got none"):
        load_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Expected a checkpoint in .*, got none"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"a configuration of this version in .*config\.json"):
        load_run(tmp_path)
