"""Laws of worker processes: the same batches as threads, errors and unusable rows told, no process left behind."""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from data_files import IMAGE_SIZE, assert_same_batches, take_batches, write_numbered_tar

from dalle_jax import config
from dalle_jax.data.loader.pipeline import open_train_source, train_batches

WORKERS = (1, 3)


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return write_numbered_tar(tmp_path_factory.mktemp("data") / "a.tar", broken=(5, 6, 20))


def worker_config(source, workers=2, **options):
    return config.DataConfig(
        **{
            "source": source,
            "batch_size": 8,
            "crop": "random",
            "prefetch": 3,
            "num_workers": workers,
            **options,
        }
    )


def gone(pid, seconds=10.0):
    """Whether a process ends within some seconds; a zombie has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


# --- the same rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_are_those_of_threads(tar, tokenizer, workers, tmp_path):
    """Pictures, crops, captions, skipped merges, what stands in for broken pictures and how it is counted; from the
    start, resumed, and for some rows of each batch."""
    told = {}
    for kind, count in (("threads", 0), ("workers", workers)):
        data = worker_config(tar, count)
        source = open_train_source(data)
        source.log_to(tmp_path / f"{kind}.jsonl")
        straight = take_batches(data, source, tokenizer, 9)
        part = take_batches(data, open_train_source(data), tokenizer, 4, start=5, rows=[1, 2, 5, 7])
        listed = sorted((tmp_path / f"{kind}.jsonl").read_text().splitlines())
        told[kind] = straight, part, source.report(), source.replacements, listed
    for got, want in zip(told["workers"][:2], told["threads"][:2], strict=True):
        assert_same_batches(got, want)
    assert told["workers"][2:] == told["threads"][2:]
    assert told["workers"][2] == {"truncated image": 3} and told["workers"][3] == {5: 7, 6: 7, 20: 21}
    assert_same_batches(
        told["workers"][1], [{k: v[[1, 2, 5, 7]] for k, v in b.items()} for b in told["workers"][0][5:]]
    )


def test_a_batch_is_the_callers(tar):
    """Later batches are made in the same memory; one that was handed out does not change."""
    data = worker_config(tar, 1, prefetch=1)
    with train_batches(data, open_train_source(data), start=0, image_size=IMAGE_SIZE) as batches:
        first = next(batches)
        kept = {name: array.copy() for name, array in first.items()}
        for _ in range(3):
            next(batches)
    assert_same_batches([first], [kept])


def test_labels_and_more_workers_than_rows(tmp_path):
    pictures = np.repeat(np.arange(5, dtype=np.uint8), 12).reshape(5, 2, 2, 3)
    np.savez(tmp_path / "a.npz", train_x=pictures, train_y=np.arange(5) % 3)
    source = config.ArraysSource(path=str(tmp_path / "a.npz"))
    data = worker_config(source, 9, batch_size=2, crop="center")
    with train_batches(data, open_train_source(data), start=0, image_size=2, with_labels=True) as batches:
        assert len(batches._processes) == 2
        for batch in (next(batches), next(batches)):
            np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 3)


# --- what goes wrong ------------------------------------------------------------------------------------


class Own:
    """A source of one's own: row i is the colour i. `at` is a row that fails, `error` how."""

    classes = ()

    def __init__(self, at=None, error=None):
        self.at, self.error = at, error

    def __len__(self):
        return 20

    def image(self, i, size, crop, rng=None):
        if i == self.at:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise self.error
        return np.full((size, size, 3), i, np.uint8)

    def name(self, i):
        return f"file {i}"

    def take_read_errors(self):
        return None


def read_all(source, **options):
    data = worker_config(config.ScenesSource(), **options)
    with train_batches(data, source, start=0, image_size=2) as batches:
        return [next(batches) for _ in range(5)]


def test_workers_load_no_jax(tar):
    """Else each would take memory, and perhaps a device, that is its parent's."""
    batches, pids = started(tar, workers=1)
    with batches:
        for pid, wanted in ((os.getpid(), True), (pids[0], False)):
            with open(f"/proc/{pid}/maps") as maps:
                assert ("jaxlib" in maps.read()) == wanted


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            ValueError("no such thing"),
            ValueError,
            r"^no such thing \(in a worker process, at row 7, file 7\)$",
        ),
        (FileNotFoundError("no file"), FileNotFoundError, "no file .*row 7, file 7"),
        (
            ZeroDivisionError("oh"),
            RuntimeError,
            r"(?s)failed at row 7, file 7:.*in image.*ZeroDivisionError: oh",
        ),
        (None, RuntimeError, "Worker process . of 2 was ended by SIGKILL, by the system if memory ran out"),
    ],
)
def test_errors_reach_the_caller(error, kind, told):
    with pytest.raises(kind, match=told):
        read_all(Own(7, error))


def test_too_many_unusable_pictures_stop_the_run(tmp_path):
    """Each of two workers sees a part of them; the share is of all."""
    source = write_numbered_tar(tmp_path / "a.tar", broken=range(0, 10))
    data = worker_config(config.TarSource(path=source.path, max_bad_fraction=0.35))
    opened = open_train_source(data)
    assert len(take_batches(data, opened, None, 12)) == 12 and opened.report() == {"truncated image": 10}
    data = worker_config(config.TarSource(path=source.path, max_bad_fraction=0.2))
    with pytest.raises(ValueError, match=r"(?s)records of .*a\.tar cannot be used.*truncated image"):
        take_batches(data, open_train_source(data), None, 12)


class Unsendable(Own):
    def __reduce__(self):
        raise TypeError("it holds a lock")


class Lost(Own):
    def __reduce__(self):
        return (exec, ("raise KeyError('gone')",))


def test_a_source_that_cannot_be_sent_is_refused():
    with pytest.raises(
        ValueError, match=r"workers is 2, but a Unsendable cannot be sent .*it holds a lock\)\. Set "
    ):
        read_all(Unsendable())
    with pytest.raises(
        ValueError, match=r"cannot be opened in a worker process \(KeyError: 'gone'\)\. Set data"
    ):
        read_all(Lost())
    with pytest.raises(ValueError, match=r"data\.num_workers of at least 0, got -1"):
        worker_config(config.ScenesSource(), -1)


# --- no process stays -----------------------------------------------------------------------------------


def started(source, **options):
    data = worker_config(source, **options)
    batches = train_batches(data, open_train_source(data), start=0, image_size=IMAGE_SIZE)
    next(batches)
    return batches, [process.pid for process in batches._processes]


def test_closing_ends_them(tar):
    batches, pids = started(tar)
    batches.close()
    batches.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    batches, pids = started(tar, workers=1)
    del batches
    gc.collect()
    assert all(gone(pid) for pid in pids)


def test_signals_of_the_job_are_left_to_the_parent(tar):
    """Ctrl-C and the SIGTERM of a scheduler reach every process of a job; the parent still wants to save."""
    batches, pids = started(tar, workers=1)
    with batches:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pids[0], number)
        for _ in range(5):
            next(batches)
    assert gone(pids[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_ends_takes_them_along(tar, how):
    """Killed it cannot clean up; interrupted it raises KeyboardInterrupt out of a `with`."""
    code = f"""
        import signal, time
        from dalle_jax import config
        from dalle_jax.data.loader.pipeline import open_train_source, train_batches
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        source = config.TarSource(path={tar.path!r}, max_bad_fraction=0.2)
        data = config.DataConfig(source=source, num_workers=2, batch_size=8)
        with train_batches(data, open_train_source(data), start=0, image_size=16) as batches:
            next(batches)
            print(*[process.pid for process in batches._processes], flush=True)
            time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watch = threading.Timer(60, parent.kill)
    watch.start()
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    watch.cancel()
    parent.send_signal(how)
    assert parent.wait(10) != 0
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_a_training_run_uses_them(tar, tmp_path):
    """`data.num_workers` may change when a run goes on."""
    from dalle_jax.checkpoint.run_dir import RESUMABLE_FIELDS

    assert "data.num_workers" in RESUMABLE_FIELDS
    assert json.loads(config.to_json(worker_config(tar, 3)))["num_workers"] == 3
