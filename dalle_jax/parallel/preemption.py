"""Stopping a training before its last step: preemption signals, and a watchdog for stalls.

The first SIGINT or SIGTERM requests a stop; a second one reaches the previous handler. With several processes every
training step reduces a flag of each process, so that all processes stop after the same step when one of them is
preempted (the host gets a SIGTERM). jax's `reached_preemption_sync_point` is not used: Orbax calls it too, with other
step numbers, and a signal during a save could be lost.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.parallel.processes import PROCESS_LOST, process_name


class PreemptionSignal:
    """The request to stop before the next step, the same on every process.

    Attributes:
      signal: the signal that this process received, or None.
      agreed: with several processes, whether a step has returned the flag of one of them.
    """

    def __init__(self):
        self.signal: int | None = None
        self.agreed = False

    def requested(self) -> bool:
        """Return whether to stop before the next step."""
        return self.agreed if jax.process_count() > 1 else self.signal is not None

    def flags(self, mesh: Mesh) -> dict[str, jax.Array]:
        """Return the input of a training step that holds the flag of each process; {} for a single process.

        The array is bool, one per device. It is not one per row, because two processes may hold the same rows.
        """
        if jax.process_count() == 1:
            return {}
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        flag = np.array([self.signal is not None])
        return {"stop": jax.make_array_from_callback((mesh.size,), sharding, lambda _: flag)}


@contextmanager
def preemption_signals() -> Generator[PreemptionSignal]:
    """Handle the first SIGINT or SIGTERM as a request to stop; a second one reaches the previous handler.

    Outside the main thread no signals are handled.
    """
    stop, previous = PreemptionSignal(), {}
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def restore():
        while previous:
            number, handler = previous.popitem()
            # None is a handler that is not Python's, such as jax's preemption handler of SIGTERM.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def handle(number, frame):
        stop.signal = number
        restore()
        name = signal.Signals(number).name
        # Not `print`, which the signal may have interrupted.
        os.write(2, f"\n{name}: finishing the step, then saving; send it again to abort\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


class Watchdog:
    """Exits the process after a stall, with a message and the stack of each thread.

    In a training of several processes all others wait for one that hangs. Each of them detects the stall and prints its
    current activity. A single process has no watchdog.

    Args:
      timeout: seconds without a new activity; 0 disables the watchdog.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._activity, self._idle = "starting", 0.0
        self._closed = threading.Event()
        if timeout and jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def at(self, activity: str) -> None:
        """Record a new activity, such as `reading the batch of step 7`, and restart the timeout."""
        self._activity, self._idle = activity, 0.0

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        interval = min(1.0, self._timeout / 10)
        last = time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            # The time for which this process itself was suspended does not count.
            self._idle += min(now - last, 2 * interval)
            last = now
            if self._idle > self._timeout:
                self._exit()
                return

    def _exit(self) -> None:
        message = (
            f"{process_name()}: no progress for {self._timeout:g} s (distributed.stall_timeout_seconds) while "
            f"{self._activity}. The process that hangs is the one with another activity than the others. Start all "
            "processes again: they resume from the last checkpoint."
        )
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(PROCESS_LOST)
