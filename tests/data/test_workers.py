"""Tests of worker processes: the same batches as with threads, errors reach the caller, no process remains."""

import gc
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
from dalle_jax.checkpoint.run_dir import open_run_dir, read_run_config
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


def ends(pid, seconds=10.0):
    """Return whether a process ends within some seconds; a zombie has ended."""
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
def test_workers_make_the_batches_of_threads(tar, tokenizer, workers, tmp_path):
    """Images, crops, captions, skipped merges, replacements of broken images and their counts; from the start, resumed,
    and for some rows of each batch."""
    results = {}
    for kind, count in (("threads", 0), ("workers", workers)):
        data = worker_config(tar, count)
        source = open_train_source(data)
        source.log_to(tmp_path / f"{kind}.jsonl")
        straight = take_batches(data, source, tokenizer, 9)
        part = take_batches(data, open_train_source(data), tokenizer, 4, start=5, rows=[1, 2, 5, 7])
        listed = sorted((tmp_path / f"{kind}.jsonl").read_text().splitlines())
        results[kind] = straight, part, source.report(), source.replacements, listed
    for got, want in zip(results["workers"][:2], results["threads"][:2], strict=True):
        assert_same_batches(got, want)
    assert results["workers"][2:] == results["threads"][2:]
    assert results["workers"][2] == {"truncated image": 3} and results["workers"][3] == {5: 7, 6: 7, 20: 21}
    assert_same_batches(
        results["workers"][1], [{k: v[[1, 2, 5, 7]] for k, v in b.items()} for b in results["workers"][0][5:]]
    )


def test_a_returned_batch_does_not_change(tar):
    """Later batches are made in the same shared memory."""
    data = worker_config(tar, 1, prefetch=1)
    with train_batches(data, open_train_source(data), start=0, image_size=IMAGE_SIZE) as batches:
        first = next(batches)
        copies = {name: array.copy() for name, array in first.items()}
        for _ in range(3):
            next(batches)
    assert_same_batches([first], [copies])


def test_labels_and_more_workers_than_rows(tmp_path):
    images = np.repeat(np.arange(5, dtype=np.uint8), 12).reshape(5, 2, 2, 3)
    np.savez(tmp_path / "a.npz", train_x=images, train_y=np.arange(5) % 3)
    source = config.ArraysSource(path=str(tmp_path / "a.npz"))
    data = worker_config(source, 9, batch_size=2, crop="center")
    with train_batches(data, open_train_source(data), start=0, image_size=2, with_labels=True) as batches:
        assert len(batches._processes) == 2
        for batch in (next(batches), next(batches)):
            np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 3)


# --- errors ---------------------------------------------------------------------------------------------


class CustomSource:
    """A source written by a user: row i has the color i. Row `at` raises `error`; None kills the process."""

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
    """A worker with jax would take memory, and perhaps a device, from its parent."""
    batches, pids = start_workers(tar, workers=1)
    with batches:
        for pid, expected in ((os.getpid(), True), (pids[0], False)):
            with open(f"/proc/{pid}/maps") as maps:
                assert ("jaxlib" in maps.read()) == expected


@pytest.mark.parametrize(
    ("error", "kind", "message"),
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
def test_errors_reach_the_caller(error, kind, message):
    with pytest.raises(kind, match=message):
        read_all(CustomSource(7, error))


def test_too_many_unusable_images_are_an_error(tmp_path):
    """Each of two workers reads some of them; max_bad_fraction applies to the sum."""
    source = write_numbered_tar(tmp_path / "a.tar", broken=range(0, 10))
    data = worker_config(config.TarSource(path=source.path, max_bad_fraction=0.35))
    opened = open_train_source(data)
    assert len(take_batches(data, opened, None, 12)) == 12 and opened.report() == {"truncated image": 10}
    data = worker_config(config.TarSource(path=source.path, max_bad_fraction=0.2))
    with pytest.raises(ValueError, match=r"(?s)records of .*a\.tar cannot be used.*truncated image"):
        take_batches(data, open_train_source(data), None, 12)


class Unsendable(CustomSource):
    def __reduce__(self):
        raise TypeError("it holds a lock")


class Unloadable(CustomSource):
    def __reduce__(self):
        return (exec, ("raise KeyError('gone')",))


def test_a_source_that_cannot_be_sent_is_rejected():
    with pytest.raises(
        ValueError, match=r"workers is 2, but a Unsendable cannot be sent .*it holds a lock\)\. Set "
    ):
        read_all(Unsendable())
    with pytest.raises(
        ValueError, match=r"cannot be opened in a worker process \(KeyError: 'gone'\)\. Set data"
    ):
        read_all(Unloadable())
    with pytest.raises(ValueError, match=r"data\.num_workers of at least 0, got -1"):
        worker_config(config.ScenesSource(), -1)


# --- end of processes -----------------------------------------------------------------------------------


def start_workers(source, **options):
    data = worker_config(source, **options)
    batches = train_batches(data, open_train_source(data), start=0, image_size=IMAGE_SIZE)
    next(batches)
    return batches, [process.pid for process in batches._processes]


def test_closing_ends_the_processes(tar):
    batches, pids = start_workers(tar)
    batches.close()
    batches.close()
    assert all(ends(pid) for pid in pids)
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    batches, pids = start_workers(tar, workers=1)
    del batches
    gc.collect()
    assert all(ends(pid) for pid in pids)


def test_workers_ignore_the_signals_of_a_job(tar):
    """Ctrl-C and the SIGTERM of a scheduler reach every process of a job, while the parent still has to save."""
    batches, pids = start_workers(tar, workers=1)
    with batches:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pids[0], number)
        for _ in range(5):
            next(batches)
    assert ends(pids[0])


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tar, signal_number):
    """A killed parent cannot clean up; an interrupted one leaves its `with` by KeyboardInterrupt."""
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
    parent.send_signal(signal_number)
    assert parent.wait(10) != 0
    assert len(pids) == 2 and all(ends(pid) for pid in pids)


def test_a_resumed_run_may_change_the_number_of_workers(tar, tmp_path):
    for workers in (0, 3):
        training = config.TrainConfig(
            model=config.DVAEConfig(), run=str(tmp_path / "run"), data=worker_config(tar, workers)
        )
        open_run_dir(training)
        assert read_run_config(training.run).data.num_workers == workers
