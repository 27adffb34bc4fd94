"""Batches built by worker processes, for sources that spend their time in Python, where threads share one lock.

Worker w of W builds rows w, w + W, w + 2 W, ... of every batch and writes them into memory shared with its parent, a
ring of `prefetch` batches. A row is a function of its position, so the number of workers changes only the speed.
Workers are new interpreters, neither forked nor started from the main module: they import what reads and decodes, never
jax, and hold no device. A worker exits when its parent closes it or dies. B rows of a batch, W workers.
"""

# Why not the process workers of grain (0.2.18, `IterDataset.mp_prefetch`): they import grain and with it jax, about
# 94 MB of private memory each instead of 23 MB, and run the main module again, so a script without a `__main__` guard
# fails. `close` waits without limit for the batch that a worker is building, a worker that exits with 0 leaves the
# parent waiting forever, and `kill -9` of the process group leaves memory and semaphores in /dev/shm. Batches lie in
# /dev/shm: a worker exits with SIGBUS when it is full, as in containers that keep it small.

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np

from dalle_jax.data.loader.examples import ArraySpecs, ExampleBuilder

_ALIGNMENT = 64  # bytes
_POLL_SECONDS = 2.0  # an idle worker checks this often whether its parent is alive
_EXIT_SECONDS = 5.0  # a worker that closed its connection has this long to exit


class ProcessBatches(Iterator[dict[str, np.ndarray]]):
    """An endless iterator over batches that processes build ahead. Close it, or use it in a `with` block."""

    def __init__(
        self,
        builder: ExampleBuilder,
        rows_at: Callable[[int], tuple[list[int], list[int]]],
        *,
        start: int,
        batch_size: int,
        num_workers: int,
        prefetch: int,
    ):
        """Start the workers.

        Args:
          builder: Builds the rows.
          rows_at: Step -> position in the stream, and row of the source, of each of the `batch_size` rows.
          start: Step of the first batch.
          batch_size: Rows of a batch.
          num_workers: Processes.
          prefetch: Batches built ahead, which bounds the shared memory.

        Raises:
          ValueError: The source cannot be sent to another process, or the system is neither Linux nor macOS.
          RuntimeError: A worker does not start.
        """
        if os.name != "posix":
            raise ValueError("data.num_workers needs Linux or macOS. Set data.num_workers to 0.")
        try:
            message = pickle.dumps((builder, batch_size, prefetch))
        except Exception as error:  # a custom source may raise anything
            raise ValueError(
                f"data.num_workers is {num_workers}, but a {type(builder.source).__name__} cannot be sent to worker "
                f"processes ({error}). Set data.num_workers to 0."
            ) from None
        self._source, self._rows_at, self._num_slots = builder.source, rows_at, prefetch
        self._next_step = start
        specs = builder.specs()
        size = _memory_size(specs, batch_size, prefetch)
        file = _open_memory(size)
        processes: list[subprocess.Popen] = []
        connections: list[Connection] = []
        self._stop = weakref.finalize(self, _stop_workers, processes, connections)  # also at exit
        try:
            for w in range(num_workers):
                ours, theirs = Pipe()
                connections.append(ours)
                processes.append(
                    _start_worker(theirs.fileno(), file.fileno(), size, os.getpid(), w, num_workers)
                )
                theirs.close()
            self._views = _make_views(mmap.mmap(file.fileno(), size), specs, batch_size, prefetch)
        except BaseException:
            self._stop()
            raise
        finally:
            file.close()
        self._processes, self._connections = processes, connections
        for w in range(num_workers):
            self._send(w, message)
        for step in range(start, start + prefetch):
            self._request(step)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._stop.alive:
            raise ValueError("The batches are closed.")
        step = self._next_step
        for w in range(len(self._connections)):
            self._receive(w)
        slot = step % self._num_slots
        batch = {name: np.array(view[slot]) for name, view in self._views.items()}
        self._next_step = step + 1
        self._request(step + self._num_slots)
        return batch

    def close(self) -> None:
        """Stop the workers. May be called twice."""
        self._stop()

    def __enter__(self) -> ProcessBatches:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _request(self, step: int) -> None:
        """Send the rows of the batch of `step` to the workers."""
        positions, rows = self._rows_at(step)
        count = len(self._connections)
        for w in range(count):
            task = (step % self._num_slots, positions[w::count], rows[w::count])
            self._send(w, pickle.dumps(task))

    def _send(self, w: int, message: bytes) -> None:
        try:
            self._connections[w].send_bytes(message)
        except OSError:  # the worker is gone; its last messages may still be readable
            while True:
                self._receive(w)  # raises at the end

    def _receive(self, w: int) -> None:
        """Receive the result of worker w for one batch; raise its error."""
        try:
            error, read_errors = pickle.loads(self._connections[w].recv_bytes())
        except (EOFError, ConnectionError):
            self._raise_lost(w)
        if error is not None:
            self.close()
            kind, message = error
            raise kind(message)
        try:
            if read_errors is not None:
                self._source.add_read_errors(read_errors)
        except ValueError:  # more unusable images than allowed, of all workers together
            self.close()
            raise

    def _raise_lost(self, w: int) -> NoReturn:
        process = self._processes[w]
        try:
            code = process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        cause = "stopped responding" if code is None else f"exited with {code}"
        if code is not None and code < 0:
            cause = f"was ended by {signal.Signals(-code).name}"
            cause += ", by the system if memory ran out" if code == -signal.SIGKILL else ""
        raise RuntimeError(
            f"Worker process {w} of {len(self._processes)} {cause}. Start again, with a smaller data.num_workers or "
            "data.prefetch if memory is short."
        ) from None


def _start_worker(*arguments: int) -> subprocess.Popen:
    """Start an interpreter with our import path, which does not run the main module. arguments: of `_run_worker`."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from dalle_jax.data.loader.workers import _run_worker; "
        f"_run_worker(*{arguments})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=arguments[:2],
        stdin=subprocess.DEVNULL,
        stdout=2,  # standard output is reserved for the command
        env={**os.environ, "JAX_PLATFORMS": "cpu"},  # in case a custom source imports jax
    )


def _stop_workers(processes: list[subprocess.Popen], connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()  # a worker has nothing to save and may be busy for long
    for process in processes:
        process.wait()


# --- memory -----------------------------------------------------------------------------------------------------


def _open_memory(size: int) -> Any:
    """Open a file in memory without a name, which is freed with the last process that holds it."""
    if sys.platform == "linux":  # not limited by the size of /dev/shm, which is small in containers
        file = os.fdopen(os.memfd_create("dalle_jax batches"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, the caller closes it
    file.truncate(size)
    return file


def _memory_layout(specs: ArraySpecs, batch_size: int, slots: int) -> dict[str, tuple[int, int]]:
    """Return the offset and the bytes of each array."""
    layout, offset = {}, 0
    for name, (shape, dtype) in specs.items():
        size = slots * batch_size * int(np.prod(shape)) * dtype.itemsize
        layout[name] = offset, size
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return layout


def _memory_size(specs: ArraySpecs, batch_size: int, slots: int) -> int:
    offset, size = list(_memory_layout(specs, batch_size, slots).values())[-1]
    return offset + size


def _make_views(memory: mmap.mmap, specs: ArraySpecs, batch_size: int, slots: int) -> dict[str, np.ndarray]:
    """Return arrays in shared memory, each (slots, batch_size, ...)."""
    layout = _memory_layout(specs, batch_size, slots)
    return {
        name: np.frombuffer(
            memory, dtype, count=slots * batch_size * int(np.prod(shape)), offset=layout[name][0]
        ).reshape(slots, batch_size, *shape)
        for name, (shape, dtype) in specs.items()
    }


# --- in the worker ----------------------------------------------------------------------------------------------


def _run_worker(connection: int, memory: int, size: int, parent: int, w: int, num_workers: int) -> None:
    """Build rows until the parent closes the connection or is gone.

    For each batch the worker sends an error, or None, and the read errors of its source. It ignores Ctrl-C and SIGTERM,
    which reach every process of a job: the parent decides when to stop.

    Args:
      connection: File descriptor of the pipe to the parent.
      memory: File descriptor of the shared memory.
      size: Bytes of the shared memory.
      parent: Process id of the parent.
      w: Number of this worker.
      num_workers: Workers in all.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Connection(connection)
    try:
        try:
            builder, batch_size, slots = pickle.loads(_receive_message(pipe, parent))
            views = _make_views(mmap.mmap(memory, size), builder.specs(), batch_size, slots)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            message = (
                f"The source cannot be opened in a worker process ({type(error).__name__}: {error}). Set "
                "data.num_workers to 0."
            )
            pipe.send_bytes(pickle.dumps(((ValueError, message), None)))
            return
        while True:
            slot, positions, rows = pickle.loads(_receive_message(pipe, parent))
            error = None
            for index, position, i in zip(range(w, batch_size, num_workers), positions, rows, strict=True):
                if os.getppid() != parent:
                    return
                try:
                    for name, array in builder(position, i).items():
                        views[name][slot, index] = array
                except Exception as raised:
                    error = _describe_error(builder, i, raised)
                    break
            pipe.send_bytes(pickle.dumps((error, builder.source.take_read_errors())))
    except (EOFError, ConnectionError):
        return


def _receive_message(pipe: Connection, parent: int) -> bytes:
    """Receive the next message. Raises EOFError if the parent closed the pipe or is gone.

    The parent is checked as well because a process that it forked may hold the other end open.
    """
    while not pipe.poll(_POLL_SECONDS):
        if os.getppid() != parent:
            raise EOFError
    return pipe.recv_bytes()


def _describe_error(builder: ExampleBuilder, i: int, raised: Exception) -> tuple[type[Exception], str]:
    """Return the class and the message for the parent to raise: an error of the data, or a traceback."""
    name = f"row {i}"
    with contextlib.suppress(Exception):  # the files of the name may be what cannot be read
        name += f", {builder.source.name(i)}"
    for kind in (FileNotFoundError, ValueError):
        if isinstance(raised, kind):
            return kind, f"{raised} (in a worker process, at {name})"
    return RuntimeError, f"A worker process failed at {name}:\n{''.join(traceback.format_exception(raised))}"
