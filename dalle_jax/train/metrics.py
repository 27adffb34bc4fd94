"""What a run tells while it goes on: metrics.jsonl, TensorBoard events, and a line on the terminal.

metrics.jsonl is the record. Rows of equal trainings are equal, character for character, but for the object
`timing`. A run that goes on drops the rows after its checkpoint first, so the series reads like that of a run
that was never stopped.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dalle_jax.files.atomic import write_atomic

_FLUSH_SECONDS = 5.0  # between flushes of the TensorBoard file; each waits for the disk
_LINE_SECONDS = 10.0  # between lines where standard error is not a terminal


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a killed process left unfinished is not one."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = []
    lines = text.split("\n")[:-1]  # what follows the last newline is unfinished
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number} is not a row of metrics: {line[:80]!r}; delete the line to go on"
            ) from None
        rows.append(row)
    return rows


def _plain(value: float) -> float | int | None:
    """A number for JSON: floats by their exact repr, null where there is no number."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, int) or math.isfinite(value) else None


class MetricsLog:
    """Appends to `run/metrics.jsonl` and `run/events/`, after dropping what lies beyond `step`.

    Every row is handed to the operating system at once: a process that is killed loses no row.
    """

    def __init__(self, run: Path, step: int):
        self.path = run / "metrics.jsonl"
        rows = read_metrics(self.path)
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        if self.path.exists() and self.path.read_text(encoding="utf-8") != kept:
            write_atomic(self.path, kept)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, closed by close()
        events = run / "events"
        events.mkdir(exist_ok=True)
        # tensorboardX's SummaryWriter writes in a thread that dies on a full disk and then blocks its caller
        # for ever; its own writer underneath raises.
        self._events = EventsWriter(str(events / "events"), filename_suffix=f".{os.getpid()}.{step}")
        start = SessionLog(
            status=SessionLog.START
        )  # hides events of later steps that an earlier process wrote
        self._events.write_event(Event(step=step + 1, wall_time=time.time(), session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, values: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """One row of `values` after `step` updates; `timing` goes under its own name and to TensorBoard."""
        row = {"step": step} | {name: _plain(value) for name, value in values.items()}
        if timing:
            row["timing"] = {name: _plain(round(value, 6)) for name, value in timing.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in (values | (timing or {})).items():
                if not math.isfinite(value):  # TensorBoard has no mark for it
                    continue
                event = Event(step=step, wall_time=time.time(), summary=summary.scalar(name, float(value)))
                self._events.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from error

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """A uint8 picture for TensorBoard."""
        event = Event(
            step=step, wall_time=time.time(), summary=summary.image(name, image_HWC, dataformats="HWC")
        )
        self._events.write_event(event)

    def sync(self) -> None:
        """Waits until every row is on the disk, so that no checkpoint is newer than its rows."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._events.close()
        finally:
            self._file.close()


class Stopwatch:
    """Seconds spent in training steps: between `read` calls, less what `pause` covered."""

    def __init__(self):
        self._start = time.monotonic()
        self._paused = 0.0

    @contextmanager
    def pause(self):
        begin = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begin

    def read(self) -> float:
        """Seconds since the last `read`; starts anew."""
        now = time.monotonic()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return max(seconds, 1e-9)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.1f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressBar:
    """Progress on standard error: a bar on a terminal, else a line now and then; nothing unless `shown`."""

    def __init__(self, name: str, start: int, steps: int, shown: bool = True):
        self._name, self._steps, self._shown = name, steps, shown
        self._printed = -math.inf
        self._bar = None
        if shown and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[figures]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                speed_estimate_period=60,
            )
            self._task = self._bar.add_task(name, total=steps, completed=start, figures="")
            self._bar.start()

    def step(self, done: int) -> None:
        """`done` updates are behind us."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def report(self, done: int, loss: float, timing: dict[str, float], seconds_left: float) -> None:
        """Shows the loss, speed, use of the chip's peak where that is known, and time left after `done` updates."""
        figures = (
            f"loss {loss:.4f}  {timing['step_seconds']:.3g} s/step  {_short(timing['rows_per_s'])} rows/s  "
            f"{_short(timing['tokens_per_s'])} tokens/s"
        )
        if "mfu" in timing:
            figures += f"  {timing['mfu']:.1%} of peak"
        if self._bar:
            self._bar.update(self._task, completed=done, figures=figures)
        elif time.monotonic() - self._printed > _LINE_SECONDS or done == self._steps:
            self._printed = time.monotonic()
            self.say(f"{self._name} {done}/{self._steps}  {figures}  {_duration(seconds_left)} left")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._shown:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
