"""Profiler trace of a window of training steps, for XProf, TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax


class Profiler:
    """Trace of the steps `first` to `last`.

    A run that resumes inside the window traces the rest of it.

    Args:
      first: First step, from 1; 0 turns the profiler off.
      last: Last step.
      path: Directory of the trace; None on the processes that write none.
    """

    def __init__(self, first: int, last: int, path: Path | None):
        self._first, self._last, self._path = first, last, path
        self._running, self._done = False, not first

    def starts_before(self, step: int) -> bool:
        """Return whether the trace starts before `step`; wait for the devices, then call `start`."""
        return not self._done and not self._running and self._first <= step <= self._last

    def start(self) -> None:
        """Start the trace."""
        self._running = True
        if self._path is not None:
            jax.profiler.start_trace(str(self._path))

    def annotate(self, step: int) -> contextlib.AbstractContextManager:
        """Return a context manager that marks the dispatch of `step` in the trace."""
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def stops_after(self, step: int) -> bool:
        """Return whether the trace ends after the dispatched `step`; wait for the devices, then call `stop`."""
        return self._running and step >= self._last

    def stop(self) -> str:
        """Write the trace and return a message that names its directory."""
        self._running, self._done = False, True
        if self._path is None:
            return ""
        jax.profiler.stop_trace()
        return f"profile of steps {self._first} to {self._last}: {self._path} (xprof --logdir {self._path})"

    def close(self) -> None:
        """Stop a trace that a signal or an error has cut short."""
        if self._running:
            self.stop()
