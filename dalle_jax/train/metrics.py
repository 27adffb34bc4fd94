"""Metrics of a run: metrics.jsonl, TensorBoard events and the progress bar.

metrics.jsonl is the record. Equal runs write equal rows, character for character, except for the object `timing`. A run
that resumes first drops the rows after its checkpoint, so the file is that of an uninterrupted run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress
from rich.console import Console
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]  # made at import time

from dalle_jax.files.atomic import write_atomic

_FLUSH_SECONDS = 5.0  # between flushes of the TensorBoard file; each waits for the disk
_LINE_SECONDS = 10.0  # between lines where standard error is not a terminal


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl.

    Args:
      path: The file; it may be missing.

    Returns:
      One dict per complete line. A last line without a newline, left by a killed process, is skipped.

    Raises:
      ValueError: If a complete line is not a row of metrics.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # text after the last newline is incomplete
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: Expected a row of metrics, got {line[:80]!r}. Delete the line to continue."
            ) from None
        rows.append(row)
    return rows


def _to_json_number(value: float) -> float | int | None:
    """Convert a number for JSON; NaN and infinities become null."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, int) or math.isfinite(value) else None


class MetricsLog:
    """Writer of `metrics.jsonl` and `events/` in a run directory.

    Opening drops the rows after `step`. Every row is flushed to the operating system at once, so a killed process loses
    none.
    """

    def __init__(self, run_dir: Path, step: int):
        self.path = run_dir / "metrics.jsonl"
        rows = read_metrics(self.path)
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        if self.path.exists() and self.path.read_text(encoding="utf-8") != kept:
            write_atomic(self.path, kept)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, closed by close()
        events = run_dir / "events"
        events.mkdir(exist_ok=True)
        # SummaryWriter of tensorboardX writes in a thread that dies on a full disk and then blocks its caller for ever;
        # the EventsWriter below it raises instead.
        self._events = EventsWriter(str(events / "events"), filename_suffix=f".{os.getpid()}.{step}")
        # TensorBoard hides the events of later steps that an earlier process wrote.
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=step + 1, wall_time=time.time(), session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, values: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """Append one row.

        Args:
          step: Number of completed updates.
          values: Metric name -> value.
          timing: Metrics of speed, which differ between equal runs; stored under the key `timing`.

        Raises:
          OSError: If the file cannot be written.
        """
        row: dict[str, Any] = {"step": step} | {
            name: _to_json_number(value) for name, value in values.items()
        }
        if timing:
            row["timing"] = {name: _to_json_number(round(value, 6)) for name, value in timing.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in (values | (timing or {})).items():
                if not math.isfinite(value):  # TensorBoard cannot show it
                    continue
                event = Event(step=step, wall_time=time.time(), summary=summary.scalar(name, float(value)))
                self._events.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from error

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Write a uint8 image (H, W, 3) to TensorBoard."""
        event = Event(
            step=step, wall_time=time.time(), summary=summary.image(name, image_HWC, dataformats="HWC")
        )
        self._events.write_event(event)

    def sync(self) -> None:
        """Wait until every row is on disk, so that no checkpoint is newer than its rows."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files."""
        try:
            self._events.close()
        finally:
            self._file.close()


class StepTimer:
    """Timer of training steps that excludes evaluation, sampling and saves."""

    def __init__(self, step: int):
        self._step, self._start, self._paused = step, time.monotonic(), 0.0

    @contextmanager
    def pause(self) -> Generator[None]:
        """Exclude the time of a `with` block."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begin

    def read(self, step: int) -> tuple[float, float]:
        """Return the seconds since the last call, and the seconds of each step, after `step` updates."""
        now = time.monotonic()
        seconds = max(now - self._start - self._paused, 1e-9)
        steps = step - self._step
        self._step, self._start, self._paused = step, now, 0.0
        return seconds, seconds / steps


def _with_unit(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.1f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressBar:
    """Progress on standard error: a bar on a terminal, otherwise a line every ten seconds; nothing if `shown` is
    False."""

    def __init__(self, name: str, start: int, steps: int, shown: bool = True):
        self._name, self._steps, self._shown = name, steps, shown
        self._printed = -math.inf
        self._bar: progress.Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[status]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                speed_estimate_period=60,
            )
            self._task = self._bar.add_task(name, total=steps, completed=start, status="")
            self._bar.start()

    def update(self, done: int) -> None:
        """Advance the bar to `done` updates."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def report(self, done: int, loss: float, timing: dict[str, float], seconds_left: float) -> None:
        """Show loss, speed and remaining time after `done` updates.

        Args:
          done: Number of completed updates.
          loss: Loss of the last one.
          timing: `step_seconds`, `rows_per_s`, `tokens_per_s`, and `mfu` if the peak of the device is known.
          seconds_left: Estimate of the time to the last step.
        """
        status = (
            f"loss {loss:.4f}  {timing['step_seconds']:.3g} s/step  {_with_unit(timing['rows_per_s'])} rows/s  "
            f"{_with_unit(timing['tokens_per_s'])} tokens/s"
        )
        if "mfu" in timing:
            status += f"  {timing['mfu']:.1%} of peak"
        if self._bar:
            self._bar.update(self._task, completed=done, status=status)
        elif time.monotonic() - self._printed > _LINE_SECONDS or done == self._steps:
            self._printed = time.monotonic()
            self.print(f"{self._name} {done}/{self._steps}  {status}  {_duration(seconds_left)} left")

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._shown:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None
