"""Tests of runs in a bucket. A local directory replaces the bucket; the state of a process is reset between starts."""

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
def bucket_run(tmp_path, monkeypatch):
    """The run directory in the local directory that replaces gs://my-bucket."""
    monkeypatch.setattr(
        remote_dir, "remote_path", lambda url: epath.Path(url.replace("gs://my-bucket", str(tmp_path)))
    )
    reset_process()
    yield tmp_path / "runs" / "one"
    reset_process()


def reset_process():
    """Reset the module to the state of a new process."""
    remote_dir._mirrors.clear()
    remote_dir._uploaded.clear()


def test_a_run_in_a_bucket_equals_one_on_disk_and_resumes_on_another_machine(bucket_run, tmp_path):
    straight = tiny_config(tmp_path / "straight")
    want = loop.train(straight, FakeTask(straight))

    config = tiny_config(RUN)
    stop = {6: lambda: os.kill(os.getpid(), signal.SIGINT)}
    assert not loop.train(config, FakeTask(config, at=stop)).finished
    reset_process()  # another machine
    got = loop.train(config, FakeTask(config))
    assert got.finished
    for x, y in zip(jax.tree.leaves(got.state), jax.tree.leaves(want.state), strict=True):
        np.testing.assert_array_equal(x, y)
    assert series(bucket_run) == series(tmp_path / "straight")
    names = {p.name for p in bucket_run.iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "events",
        "metrics.jsonl",
        "samples",
        "text_tokenizer.model",
    }
    assert sorted(p.name for p in (bucket_run / "checkpoints").iterdir()) == ["10", "8"]
    assert {p.name for p in (bucket_run / "samples").iterdir()} == {"step_00000005.png", "step_00000010.png"}

    reset_process()
    assert run_dir.read_run_config(RUN) == config
    run = load_run(RUN, step="latest")
    assert run.step == 10
    want = load_run(tmp_path / "straight", step="latest")
    for x, y in zip(jax.tree.leaves(run.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_metrics_are_uploaded_before_the_checkpoint(bucket_run, monkeypatch):
    """When a save starts, the bucket has the metrics up to its step, so a kill at any moment leaves no gap."""
    saves, save = [], CheckpointManager.save

    def recording_save(self, step, *rest):
        saves.append((step, series(bucket_run)[-1]["step"]))
        save(self, step, *rest)

    monkeypatch.setattr(CheckpointManager, "save", recording_save)
    config = tiny_config(RUN)
    loop.train(config, FakeTask(config))
    assert saves == [(4, 4), (8, 8), (10, 10)]


def test_only_changed_files_are_copied(bucket_run, monkeypatch):
    run = remote_dir.local_dir(RUN)
    (run / "image_tokenizer").mkdir()
    (run / "image_tokenizer" / "a").write_text("1")
    (run / "config.json").write_text("{}")
    (run / ".config.json.7.tmp").write_text("half")
    remote_dir.upload_run(run)
    assert {str(p.relative_to(bucket_run)) for p in bucket_run.rglob("*") if p.is_file()} == {
        "config.json",
        "image_tokenizer/a",
    }
    (bucket_run / "config.json").unlink()
    (run / "image_tokenizer" / "a").write_text("22")
    remote_dir.upload_run(run)
    assert (bucket_run / "image_tokenizer" / "a").read_text() == "22" and not (
        bucket_run / "config.json"
    ).exists()
    reset_process()
    assert (remote_dir.local_dir(RUN) / "image_tokenizer" / "a").read_text() == "22"


def test_a_missing_run_is_named_by_its_url(bucket_run, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"Expected a run directory, got gs://my-bucket/runs/one without config.json"
    ):
        run_dir.read_run_config(RUN)


class _BucketPath:
    """A local path whose name is that of a bucket."""

    def __init__(self, path):
        self._path = path

    def __str__(self):
        return f"gs://my-bucket{self._path}"

    def __truediv__(self, name):
        return _BucketPath(self._path / name)

    def __getattr__(self, name):
        return getattr(self._path, name)


def test_an_unfinished_save_in_a_bucket_is_no_checkpoint(tmp_path):
    """A bucket has no atomic rename: files are written to their final path one by one, the commit mark last."""
    config = tiny_config(tmp_path / "run")
    loop.train(config, FakeTask(config))
    saves = tmp_path / "run" / "checkpoints"
    assert CheckpointManager(_BucketPath(saves)).steps == [8, 10]
    (saves / "8" / "commit_success.txt").unlink()
    assert CheckpointManager(_BucketPath(saves)).steps == [10]
    assert CheckpointManager(saves).steps == [8, 10]


@pytest.mark.parametrize("url", ["https://host/run", "file:///tmp/run", "foo://run"])
def test_other_kinds_of_urls_are_refused(url):
    with pytest.raises(ValueError, match=rf"begins with gs:// or s3://, got {url}"):
        remote_dir.local_dir(url)


def test_a_missing_package_is_named(monkeypatch):
    def no_gcsfs(url):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(epath, "Path", no_gcsfs)
    with pytest.raises(ValueError, match=r"gs://b/r needs a package \(for gs://, pip install gcsfs\)"):
        remote_dir.remote_path("gs://b/r")


def test_a_failed_upload_is_an_error(bucket_run, monkeypatch):
    run = remote_dir.local_dir(RUN)
    (run / "config.json").write_text("{}")
    bucket_run.parent.write_text("in the way")
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
    with open(tmp_path / "server.log", "w") as log:  # an unread pipe would be full after 64 KB
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
    """Two processes, one of them killed; two others resume, then one. The metrics equal those of a run on disk."""
    url, there = "gs://bucket/runs/one", tmp_path / "root" / "bucket" / "runs" / "one"
    for n, (count, event) in enumerate(((2, "SIGKILL:1:9"), (2, "SIGTERM:0:14"), (1, "none:-1:-1"))):
        job = Job(tmp_path / f"job{n}", count, 8 // count, event, SHORT, url=url, env=emulator)
        codes = job.codes()
        assert 0 not in codes if n == 0 else codes == [0] * count, job.logs_text()
        assert "resuming from step" in job.log(0) or n == 0
    want = straight_run(tmp_path / "straight")
    assert_close(series(there), series(want))
    assert (there / "checkpoints" / "24" / "commit_success.txt").exists()
