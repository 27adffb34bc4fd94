"""Batches by worker processes, for sources that keep Python busy: threads of one process take turns in it.

Of every batch worker w of W makes rows w, w + W, w + 2 W, ... and writes them into memory that it shares with its
parent, in a ring of `prefetch` batches. A row follows from its position alone, so the number of workers changes
nothing but the speed. Workers are new interpreters, neither forked nor made from the main module: they import what
reads and decodes, never jax, and hold no device. A worker ends when its parent closes it or dies, whatever way. B rows
of a batch, W workers.
"""

# Why not the process workers of grain (0.2.18, `IterDataset.mp_prefetch`): they import grain and with it jax, about
# 94 MB of private memory each instead of 23 MB, and run the main module again, so a script without a `__main__` guard
# fails. `close` waits without limit for the batch that a worker is making, a worker that exits with 0 leaves the parent
# waiting forever, and `kill -9` of the process group leaves memory and semaphores in /dev/shm. Batches lie in /dev/shm:
# a worker ends with SIGBUS when it is full, as in containers that keep it small.

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
from typing import Any

import numpy as np

from dalle_jax.data.loader.examples import ExampleBuilder

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]

_ALIGN = 64  # bytes
_LOOK = 2.0  # seconds after which a worker without work looks whether its parent lives
_PATIENCE = 5.0  # seconds in which a worker that hung up has to end


class ProcessBatches(Iterator[dict[str, np.ndarray]]):
    """An endless iterator over the batches of steps `start`, `start + 1`, ...; close it, or use it in a `with`."""

    def __init__(
        self,
        maker: ExampleBuilder,
        rows_of: Callable[[int], tuple[list[int], list[int]]],
        *,
        start: int,
        batch: int,
        workers: int,
        prefetch: int,
    ):
        """rows_of: step -> position in the stream and row of the source, of each of its `batch` rows.
        prefetch: batches made ahead, which bounds the shared memory.

        Raises ValueError for a source that cannot be sent to another process, RuntimeError for workers that do not
        start.
        """
        if os.name != "posix":
            raise ValueError("data.num_workers needs Linux or macOS; set data.num_workers 0")
        try:
            sent = pickle.dumps((maker, batch, prefetch))
        except Exception as error:  # whatever a source of one's own raises
            raise ValueError(
                f"data.num_workers is {workers}, but a {type(maker.source).__name__} cannot be sent to worker processes "
                f"({error}); set data.num_workers 0"
            ) from None
        self._source, self._rows_of, self._slots = maker.source, rows_of, prefetch
        self._next = start
        layout = maker.specs()
        size = _size(layout, batch, prefetch)
        file = _memory(size)
        processes: list[subprocess.Popen] = []
        connections: list[Connection] = []
        self._end = weakref.finalize(self, _end, processes, connections)  # also when the interpreter ends
        try:
            for w in range(workers):
                ours, theirs = Pipe()
                connections.append(ours)
                processes.append(_start(theirs.fileno(), file.fileno(), size, os.getpid(), w, workers))
                theirs.close()
            self._views = _views(mmap.mmap(file.fileno(), size), layout, batch, prefetch)
        except BaseException:
            self._end()
            raise
        finally:
            file.close()
        self._processes, self._connections = processes, connections
        for w in range(workers):
            self._send(w, sent)
        for step in range(start, start + prefetch):
            self._ask(step)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._end.alive:
            raise ValueError("the batches are closed")
        step = self._next
        for w in range(len(self._connections)):
            self._collect(w)
        slot = step % self._slots
        made = {name: np.array(view[slot]) for name, view in self._views.items()}
        self._next = step + 1
        self._ask(step + self._slots)
        return made

    def close(self) -> None:
        """Ends the workers. Closing twice is fine."""
        self._end()

    def __enter__(self) -> ProcessBatches:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _ask(self, step: int) -> None:
        positions, rows = self._rows_of(step)
        count = len(self._connections)
        for w in range(count):
            task = (step % self._slots, positions[w::count], rows[w::count])
            self._send(w, pickle.dumps(task))

    def _send(self, w: int, message: bytes) -> None:
        try:
            self._connections[w].send_bytes(message)
        except OSError:  # it is gone; what it had to say before may still be there
            while True:
                self._collect(w)  # raises at the end

    def _collect(self, w: int) -> None:
        """Takes what worker w has to say of one batch."""
        try:
            error, findings = pickle.loads(self._connections[w].recv_bytes())
        except (EOFError, ConnectionError):
            self._lost(w)
        if error is not None:
            self.close()
            kind, told = error
            raise kind(told)
        try:
            if findings is not None:
                self._source.add_read_errors(findings)
        except ValueError:  # more unusable pictures than allowed, of all workers together
            self.close()
            raise

    def _lost(self, w: int) -> None:
        process = self._processes[w]
        try:
            code = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        told = "stopped answering" if code is None else f"exited with {code}"
        if code is not None and code < 0:
            told = f"was ended by {signal.Signals(-code).name}"
            told += ", by the system if memory ran out" if code == -signal.SIGKILL else ""
        raise RuntimeError(
            f"worker process {w} of {len(self._processes)} {told}; start again, with fewer data.num_workers or a smaller "
            "data.prefetch if memory is short"
        ) from None


def _start(*arguments: int) -> subprocess.Popen:
    """A worker: a new interpreter with our import path, which leaves the main module alone. arguments: of `work`."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from dalle_jax.data.loader.workers import work; work(*{arguments})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=arguments[:2],
        stdin=subprocess.DEVNULL,
        stdout=2,  # standard output belongs to the command that runs
        env={**os.environ, "JAX_PLATFORMS": "cpu"},  # should a source of one's own import jax
    )


def _end(processes: list[subprocess.Popen], connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()  # a worker has nothing to save, and may be busy for long
    for process in processes:
        process.wait()


# --- memory -----------------------------------------------------------------------------------------------------


def _memory(size: int) -> Any:
    """A file in memory without a name, which ends with the last process that has it open."""
    if hasattr(os, "memfd_create"):  # Linux; not bounded by the size of /dev/shm, which containers keep small
        file = os.fdopen(os.memfd_create("dalle_jax batches"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, the caller closes it
    file.truncate(size)
    return file


def _offsets(layout: Layout, batch: int, slots: int) -> dict[str, tuple[int, int]]:
    """Where each array begins, and its bytes."""
    found, at = {}, 0
    for name, (shape, kind) in layout.items():
        size = slots * batch * int(np.prod(shape)) * kind.itemsize
        found[name] = at, size
        at += -(-size // _ALIGN) * _ALIGN
    return found


def _size(layout: Layout, batch: int, slots: int) -> int:
    at, size = list(_offsets(layout, batch, slots).values())[-1]
    return at + size


def _views(memory: mmap.mmap, layout: Layout, batch: int, slots: int) -> dict[str, np.ndarray]:
    """Arrays in shared memory, (slots, batch, ...) each."""
    return {
        name: np.frombuffer(memory, kind, count=slots * batch * int(np.prod(shape)), offset=at).reshape(
            slots, batch, *shape
        )
        for (name, (shape, kind)), (at, _) in zip(
            layout.items(), _offsets(layout, batch, slots).values(), strict=True
        )
    }


# --- in the worker ----------------------------------------------------------------------------------------------


def work(connection: int, memory: int, size: int, parent: int, w: int, workers: int) -> None:
    """What worker w does until its parent closes the connection or is gone.

    Answers each batch with an error, None for none, and with what it found of the source. Ctrl-C and SIGTERM reach
    every process of a job; the parent decides when to end, a worker waits for that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    talk = Connection(connection)
    try:
        try:
            maker, batch, slots = pickle.loads(_heard(talk, parent))
            views = _views(mmap.mmap(memory, size), maker.specs(), batch, slots)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            told = f"the source cannot be opened in a worker process ({_told(error)}); set data.num_workers 0"
            talk.send_bytes(pickle.dumps(((ValueError, told), None)))
            return
        while True:
            slot, positions, rows = pickle.loads(_heard(talk, parent))
            error = None
            for at, position, i in zip(range(w, batch, workers), positions, rows, strict=True):
                if os.getppid() != parent:
                    return
                try:
                    for name, array in maker(position, i).items():
                        views[name][slot, at] = array
                except Exception as raised:
                    error = _error(maker, i, raised)
                    break
            talk.send_bytes(pickle.dumps((error, maker.source.take_read_errors())))
    except (EOFError, ConnectionError):
        return


def _heard(talk: Connection, parent: int) -> bytes:
    """The next message. Raises EOFError if the parent closed the connection or is gone; a process that it forked may
    hold the other end open."""
    while not talk.poll(_LOOK):
        if os.getppid() != parent:
            raise EOFError
    return talk.recv_bytes()


def _error(maker: ExampleBuilder, i: int, raised: Exception) -> tuple[type[Exception], str]:
    """What the parent is to raise: the same kind of error with the row's name where it is one of the data; else all
    that is known of it."""
    name = f"row {i}"
    with contextlib.suppress(Exception):  # a source without names, or whose names are not to be had
        name += f", {maker.source.name(i)}"
    for kind in (FileNotFoundError, ValueError):
        if isinstance(raised, kind):
            return kind, f"{raised} (a worker process was at {name})"
    return RuntimeError, f"a worker process failed at {name}:\n{_told(raised, whole=True)}"


def _told(error: Exception, whole: bool = False) -> str:
    return "".join(traceback.format_exception(error)) if whole else f"{type(error).__name__}: {error}"
