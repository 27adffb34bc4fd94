"""Runs in a bucket: a directory stands in for it, and every process's mirror is forgotten between starts."""

import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from etils import epath
from fake_task import FakeTask, tiny_config
from jobs import SHORT, Job, assert_close, free_port, series, straight_run

from dalle_jax.checkpoint import remote_dir, run_dir
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.manager import CheckpointManager
from dalle_jax.train import loop

pytestmark = pytest.mark.usefixtures("fake_models")

RUN = "gs://my-bucket/runs/one"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The stand-in: gs://my-bucket is this directory."""
    monkeypatch.setattr(
        remote_dir, "remote_path", lambda url: epath.Path(url.replace("gs://my-bucket", str(tmp_path)))
    )
    forget()
    yield tmp_path / "runs" / "one"
    forget()


def forget():
    """What a new process knows."""
    remote_dir._mirrors.clear()
    remote_dir._uploaded.clear()


def test_a_run_in_a_bucket_equals_one_on_disk_and_goes_on_elsewhere(store, tmp_path):
    straight = tiny_config(tmp_path / "straight")
    want = loop.train(straight, FakeTask(straight))

    config = tiny_config(RUN)
    stop = {6: lambda: os.kill(os.getpid(), signal.SIGINT)}
    assert not loop.train(config, FakeTask(config, at=stop)).finished
    forget()  # another machine
    got = loop.train(config, FakeTask(config))
    assert got.finished
    for x, y in zip(jax.tree.leaves(got.state), jax.tree.leaves(want.state), strict=True):
        np.testing.assert_array_equal(x, y)
    assert series(store) == series(tmp_path / "straight")
    names = {p.name for p in store.iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "events",
        "metrics.jsonl",
        "samples",
        "text_tokenizer.model",
    }
    assert sorted(p.name for p in (store / "checkpoints").iterdir()) == ["10", "8"]
    assert {p.name for p in (store / "samples").iterdir()} == {"step_00000005.png", "step_00000010.png"}

    forget()
    assert run_dir.read_config(RUN) == config
    run = load_run(RUN, step="latest")
    assert run.step == 10
    want = load_run(tmp_path / "straight", step="latest")
    for x, y in zip(jax.tree.leaves(run.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_checkpoint_is_newer_than_its_rows(store, monkeypatch):
    """When a save begins, the bucket has the rows up to it: a kill at any moment leaves no gap."""
    seen, save = [], CheckpointManager.save

    def looking(self, step, *rest):
        seen.append((step, series(store)[-1]["step"]))
        save(self, step, *rest)

    monkeypatch.setattr(CheckpointManager, "save", looking)
    config = tiny_config(RUN)
    loop.train(config, FakeTask(config))
    assert seen == [(4, 4), (8, 8), (10, 10)]


def test_only_what_has_changed_is_copied(store, monkeypatch):
    run = remote_dir.local_dir(RUN)
    (run / "image_tokenizer").mkdir()
    (run / "image_tokenizer" / "a").write_text("1")
    (run / "config.json").write_text("{}")
    (run / ".config.json.7.tmp").write_text("half")
    remote_dir.upload_run(run)
    assert {str(p.relative_to(store)) for p in store.rglob("*") if p.is_file()} == {
        "config.json",
        "image_tokenizer/a",
    }
    (store / "config.json").unlink()
    (run / "image_tokenizer" / "a").write_text("22")
    remote_dir.upload_run(run)
    assert (store / "image_tokenizer" / "a").read_text() == "22" and not (store / "config.json").exists()
    forget()
    assert (remote_dir.local_dir(RUN) / "image_tokenizer" / "a").read_text() == "22"


def test_what_is_not_there_is_named_by_its_url(store, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gs://my-bucket/runs/one is not a run directory"):
        run_dir.read_config(RUN)


class _InBucket:
    """A directory that says it is in a bucket."""

    def __init__(self, path):
        self._path = path

    def __str__(self):
        return f"gs://my-bucket{self._path}"

    def __truediv__(self, name):
        return _InBucket(self._path / name)

    def __getattr__(self, name):
        return getattr(self._path, name)


def test_what_a_bucket_holds_of_an_unfinished_save_is_no_checkpoint(tmp_path):
    """There the parts of a save come one by one, in their final place; the mark comes last."""
    config = tiny_config(tmp_path / "run")
    loop.train(config, FakeTask(config))
    saves = tmp_path / "run" / "checkpoints"
    assert CheckpointManager(_InBucket(saves)).steps == [8, 10]
    (saves / "8" / "commit_success.txt").unlink()
    assert CheckpointManager(_InBucket(saves)).steps == [10]
    assert CheckpointManager(saves).steps == [8, 10]


def test_a_missing_package_is_named(monkeypatch):
    def no_gcsfs(url):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(epath, "Path", no_gcsfs)
    with pytest.raises(ValueError, match=r"gs://b/r needs a package \(for gs://, pip install gcsfs\)"):
        remote_dir.remote_path("gs://b/r")


def test_a_store_that_refuses_is_told(store, monkeypatch):
    run = remote_dir.local_dir(RUN)
    (run / "config.json").write_text("{}")
    store.parent.write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*config\.json: "):
        remote_dir.upload_run(run)


@pytest.fixture
def emulator(tmp_path):
    """A server of a bucket that is the directory `root/bucket`; what a process needs to find it."""
    if not (binary := shutil.which("fake-gcs-server")):
        pytest.skip("no fake-gcs-server in PATH")
    pytest.importorskip("gcsfs")
    (tmp_path / "root" / "bucket").mkdir(parents=True)
    url = f"http://127.0.0.1:{free_port()}"
    argv = [
        binary,
        "-scheme",
        "http",
        "-host",
        "127.0.0.1",
        "-port",
        url.rpartition(":")[2],
        "-external-url",
        url,
    ]
    argv += ["-backend", "filesystem", "-filesystem-root", str(tmp_path / "root")]
    with open(tmp_path / "server.log", "w") as log:  # a pipe that nobody reads would be full after 64 KB
        server = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        for _ in range(1000):
            if "server started" in (tmp_path / "server.log").read_text():
                break
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.01)
        yield {
            "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "NO_GCE_CHECK": "true", "FSSPEC_GCS_TOKEN": "anon", "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }  # fmt: skip
    finally:
        server.kill()


@pytest.mark.slow
def test_several_processes_in_a_bucket(tmp_path, emulator):
    """Two processes, one of them killed; two others go on, then one: the figures are those of a run on disk."""
    url, there = "gs://bucket/runs/one", tmp_path / "root" / "bucket" / "runs" / "one"
    for n, (count, event) in enumerate(((2, "SIGKILL:1:9"), (2, "SIGTERM:0:14"), (1, "none:-1:-1"))):
        job = Job(tmp_path / f"job{n}", count, 8 // count, event, SHORT, url=url, env=emulator)
        codes = job.codes()
        assert 0 not in codes if n == 0 else codes == [0] * count, job.logs_text()
        assert "resuming from step" in job.log(0) or n == 0
    want = straight_run(tmp_path / "straight")
    assert_close(series(there), series(want))
    assert (there / "checkpoints" / "24" / "commit_success.txt").exists()
