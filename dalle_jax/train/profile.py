"""A window of training steps recorded for XProf, TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax


class Profiler:
    """Records the steps `first` to `last` in `path`; nothing where `first` is 0, or `path` None (other processes).

    A training that goes on inside the window records from where it is.
    """

    def __init__(self, first: int, last: int, path: Path | None):
        self._first, self._last, self._path = first, last, path
        self._open, self._over = False, not first

    def begins(self, step: int) -> bool:
        """Whether recording begins with `step`, which has not begun: time to wait for the devices, then `start`."""
        return not self._over and not self._open and self._first <= step <= self._last

    def start(self) -> None:
        self._open = True
        if self._path is not None:
            jax.profiler.start_trace(str(self._path))

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """To be held while `step` is sent to the devices: its mark in the profile."""
        if not self._open:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def ends(self, step: int) -> bool:
        """Whether `step`, which is sent, is the last one: time to wait for the devices, then `stop`."""
        return self._open and step >= self._last

    def stop(self) -> str:
        """Writes what was recorded; returns where it is."""
        self._open, self._over = False, True
        if self._path is None:
            return ""
        jax.profiler.stop_trace()
        return (
            f"steps {self._first} to {self._last} are recorded in {self._path} (xprof --logdir {self._path})"
        )

    def close(self) -> None:
        """Ends a recording that a stop or an error has cut short."""
        if self._open:
            self.stop()
