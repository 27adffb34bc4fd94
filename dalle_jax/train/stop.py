"""How a training ends before its last step: by a signal that all processes agree on, or because nothing moves.

One process: the first SIGINT or SIGTERM asks for a stop, the next acts as it would have without us. Several:
jax spreads the SIGTERM of any of them (a preempted host gets one) and names the step after which all stop; a
SIGINT is turned into that.
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
from jax.experimental import multihost_utils

from dalle_jax.train.processes import LOST, whoami


class Stop:
    """Whether to stop before the next step: the same answer on every process."""

    def __init__(self):
        self.signal: int | None = None
        self._calls = 0

    def asked(self) -> bool:
        """To be called after every step, by all processes equally often."""
        if jax.process_count() == 1:
            return self.signal is not None
        # jax answers True for exactly one number; numbers that do not start at 1 could pass it by.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into a request to stop; the next one acts as it did before."""
    stop, before = Stop(), {}
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    several = jax.process_count() > 1

    def restore():
        while before:
            number, handler = before.popitem()
            # None: a handler that is not Python's, as jax's own for SIGTERM, which our own stands in for.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def handle(number, frame):
        stop.signal = number
        restore()
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: finishing the step, then saving; once more to abort\n".encode())
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # to jax, which tells the others

    for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
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
            f"{whoami()}: nothing has moved for {self._limit:g} s (distributed.stall_seconds); it was {self._what}. "
            "A process that was at something else than the others is the one that hangs. Start all processes "
            "again: they go on from the last checkpoint"
        )
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(LOST)
