"""How a training ends before its last step: by a signal that all processes agree on, or because nothing moves.

The first SIGINT or SIGTERM asks for a stop, the next acts as it would have without us. On several processes every
training step carries a flag of each, and all read from its result whether one of them was asked (a preempted host
gets a SIGTERM): so all stop after the same step. jax's own way to agree (`reached_preemption_sync_point`) is not
used: Orbax calls it too, with other numbers, and a signal that came beside a save could be lost.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.parallel.processes import LOST, process_name


class PreemptionSignal:
    """Whether to stop before the next step: the same answer on every process.

    signal: what this process was asked by. agreed: a step has told that one of several processes was asked.
    """

    def __init__(self):
        self.signal: int | None = None
        self.agreed = False

    def requested(self) -> bool:
        return self.agreed if jax.process_count() > 1 else self.signal is not None

    def flags(self, mesh: Mesh) -> dict[str, jax.Array]:
        """What a batch holds beside its rows, for `make_step`: of several processes, who was asked.

        One bool for each device. Rows would not do: two processes may hold the same ones.
        """
        if jax.process_count() == 1:
            return {}
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        mine = np.array([self.signal is not None])
        return {"stop": jax.make_array_from_callback((mesh.size,), sharding, lambda _: mine)}


@contextmanager
def preemption_signals() -> Iterator[PreemptionSignal]:
    """Turns the first SIGINT or SIGTERM into a request to stop; the next one acts as it did before."""
    stop, before = PreemptionSignal(), {}
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def restore():
        while before:
            number, handler = before.popitem()
            # None: a handler that is not Python's, as that of jax where it takes SIGTERM for itself.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def handle(number, frame):
        stop.signal = number
        restore()
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: finishing the step, then saving; once more to abort\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


class Watchdog:
    """Ends this process, with a message and the place where each thread is, when nothing moves for `limit` seconds.

    For a training of several processes, in which one that hangs lets all others wait for it: each of them sees
    that nothing moves, and says what it was at. 0 turns it off.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._what, self._idle = "starting", 0.0
        self._closed = threading.Event()
        if limit and jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def at(self, what: str) -> None:
        """Begins something new: all is well until it has taken `limit` seconds."""
        self._what, self._idle = what, 0.0

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        every = min(1.0, self._limit / 10)
        before = time.monotonic()
        while not self._closed.wait(every):
            now = time.monotonic()
            # A process that was itself halted for an hour has not been idle for an hour.
            self._idle += min(now - before, 2 * every)
            before = now
            if self._idle > self._limit:
                self._end()
                return

    def _end(self) -> None:
        text = (
            f"{process_name()}: nothing has moved for {self._limit:g} s (distributed.stall_timeout_seconds); it was {self._what}. "
            "A process that was at something else than the others is the one that hangs. Start all processes "
            "again: they go on from the last checkpoint"
        )
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(LOST)
