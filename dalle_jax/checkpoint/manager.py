"""Checkpoints on disk; the only file that imports Orbax (its v1 interface).

A save is atomic: Orbax writes beside the final place and renames, so a directory with a step's number is whole,
and what a killed process left is not taken for a checkpoint. A deletion is atomic, too: it begins with a rename. A
checkpoint that cannot be read stops the caller with its name; nothing falls back to an older one, or to new
parameters, on its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from dalle_jax.typing import Params

# Orbax logs the traceback of each failing thread; every failure reaches our caller as an error with a
# message.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)

_MARK = "commit_success.txt"
_DELETED = ".deleted"

BestMetric = tuple[str, Literal["min", "max"]]


class CheckpointManager:
    """The checkpoints of one run: saved while training goes on, the last `keep` and the best one kept.

    path: the directory, made if missing: a Path, or what `bucket.remote` makes of a URL. keep: how many of the
    latest survive; None opens the directory for reading only: nothing is deleted and nothing is made, and what is
    there is looked up once. best: name of a measure, and whether the smallest or the largest is best. alone: this
    process reads by itself. Else every method is called on all processes, from the main thread: each writes what its
    devices hold, and the first one finishes the directory.
    """

    def __init__(
        self, path: Any, keep: int | None = None, best: BestMetric | None = None, alone: bool = False
    ):
        self.path = path.absolute() if isinstance(path, Path) else path
        self.keep, self.best_measure, self.alone = keep, best, alone
        self._pending: tuple[_Found, Any] | None = None
        self._thread, self._deleting = ThreadPoolExecutor(1), None
        if keep is None and not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a directory; want the checkpoints/ of a run")
        # For reading there is none: it would want to make the directory, which one of several processes cannot alone.
        self._orbax = None if keep is None else self._open()
        self._found = [self._look(step) for step in _finished(self.path)]

    def _open(self) -> ocp.training.Checkpointer:
        try:
            if self.path.is_dir() and jax.process_index() == 0:  # a killed process was about to delete them
                for left in [p for p in self.path.iterdir() if p.name.endswith(_DELETED)]:
                    epath.Path(left).rmtree()
            return ocp.training.Checkpointer(
                self.path,
                context=_context(alone=self.alone),
                cleanup_tmp_directories=True,
                save_decision_policy=_Always(),
            )
        except (OSError, ValueError) as error:
            for step in reversed(_numbered(self.path)):
                self._look(step)
            raise OSError(f"cannot open the checkpoints in {self.path}: {_first_line(error)}") from error

    def _look(self, step: int) -> _Found:
        """The measures of a checkpoint, if it has any. Raises OSError where they are damaged."""
        file = self.path / str(step) / "metrics" / "metrics"
        try:
            metrics = json.loads(file.read_text()) if file.exists() else None
            if not isinstance(metrics, dict | None):
                raise ValueError(f"{file.name} holds no object")
        except (OSError, ValueError) as error:
            raise self._read_error(step, error) from error
        return _Found(step, metrics)

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        return [c.step for c in self._found]

    @property
    def latest(self) -> int | None:
        return self.steps[-1] if self.steps else None

    @property
    def best(self) -> int | None:
        """The step with the best measure; None where no checkpoint carries one."""
        index = _best_index(self._found)
        return None if index is None else self.steps[index]

    def save(self, step: int, state: Any, measures: dict[str, float] | None = None) -> None:
        """Begins to save `state`; returns once it is copied off the device, the writing goes on behind.

        measures: what the evaluation at this very step found, or None. First waits for the save before, and
        raises OSError if that one failed.
        """
        self.wait()
        metrics = None
        if self.best_measure and measures and math.isfinite(measures.get(self.best_measure[0], math.nan)):
            name, order = self.best_measure
            metrics = {"measure": name, "order": order, "value": measures[name]}
        try:
            response = self._orbax.save_async(step, state, metrics=metrics, force=True)
            self._pending = (_Found(step, metrics), response)
        except Exception as error:
            raise self._save_error(step, error) from error

    def check(self) -> None:
        """Raises OSError if a save has failed in the meantime; does not wait."""
        self._collect(timeout=0)

    def wait(self) -> None:
        """Waits until the last save is on disk, and what it replaces gone. Raises OSError if it failed."""
        self._collect(timeout=None)
        self._end_deleting()

    def _collect(self, timeout: float | None) -> None:
        if self._pending is None:
            return
        saved, response = self._pending
        try:
            response.result(timeout=timeout)
        except TimeoutError:
            if timeout is None:
                self._pending = None
                raise
            return  # still writing
        except Exception as error:
            self._pending = None
            raise self._save_error(saved.step, error) from error
        self._pending = None
        self._found = [*(c for c in self._found if c.step != saved.step), saved]
        self._delete_superfluous()

    def _delete_superfluous(self) -> None:
        """Forgets all but the latest `keep` and the best; the first process deletes them, behind the training."""
        best = self.best
        kept = [c for i, c in enumerate(self._found) if i >= len(self._found) - self.keep or c.step == best]
        gone = [self.path / str(c.step) for c in self._found if c not in kept]
        self._found = kept
        if gone and jax.process_index() == 0:
            self._end_deleting()
            self._deleting = self._thread.submit(_delete, gone)

    def _end_deleting(self) -> None:
        deleting, self._deleting = self._deleting, None
        if deleting is not None:
            deleting.result()

    def _save_error(self, step: int, error: Exception) -> OSError:
        intact = [str(s) for s in _numbered(self.path) if s != step]
        before = (
            f"steps saved before, all intact: {', '.join(intact)}" if intact else "no step was saved before"
        )
        return OSError(
            f"cannot save the checkpoint of step {step} in {self.path}: {_first_line(error)} ({before}). "
            "Make room or choose a writable place, then run the same command again"
        )

    def load(self, step: int, abstract: Any, partial: bool = False) -> Any:
        """The state of `step`, laid out as `abstract` (ShapeDtypeStructs with shardings) says.

        partial: `abstract` is a dict of some top entries (`{"params": ...}`); the others are not read. Raises
        ValueError naming the leaves whose name, shape or dtype differ, OSError for a checkpoint that cannot
        be read.
        """
        saved = self.shapes(step)
        if partial:
            saved = {name: saved.get(name) for name in abstract}
        check_shapes(abstract, saved, self.path / str(step))
        try:
            with _context(partial, self.alone):
                return ocp.load(self.path / str(step), abstract)
        except Exception as error:
            raise self._read_error(step, error) from error

    def shapes(self, step: int) -> Any:
        """The tree of what is saved, leaves with `.shape` and `.dtype`; reads no array."""
        if step not in self.steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.path}; it has {self.steps}")
        try:
            tree = ocp.metadata(self.path / str(step)).metadata
        except Exception as error:
            raise self._read_error(step, error) from error
        if not _leaves(tree):
            raise self._read_error(step, ValueError("it lists no arrays"))
        return tree

    def _read_error(self, step: int, error: Exception) -> OSError:
        earlier = [s for s in _numbered(self.path) if s < step]
        then = (
            f"go on from step {earlier[-1]}"
            if earlier
            else "start again from step 0, as no earlier one exists"
        )
        return OSError(
            f"the checkpoint {self.path / str(step)} cannot be read, it is damaged or incomplete: "
            f"{_first_line(error)}. Delete that directory to {then}"
        )

    def close(self) -> None:
        """Waits for the last save and lets go of the directory. Raises OSError if the save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # a failed save is told above, or was before
                self._thread.shutdown()
                if self._orbax is not None:
                    self._orbax.close()


def load_params(path: Path, abstract: Params | None = None) -> Params:
    """The tree of arrays in an Orbax directory; each process that wants it calls by itself.

    abstract: ShapeDtypeStructs with shardings on devices of this process; None puts every array whole on the
    first one. Raises FileNotFoundError, ValueError for other names or shapes than `abstract` has, OSError for
    damaged files.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"no parameters at {path}")
    try:
        saved = ocp.metadata(path).metadata
    except Exception as error:
        raise OSError(f"the parameters at {path} cannot be read: {_first_line(error)}") from error
    if abstract is None:
        abstract = on_one_device(saved)
    check_shapes(abstract, saved, path)
    try:
        with _context(alone=True):
            return ocp.load(path, abstract)
    except Exception as error:
        raise OSError(f"the parameters at {path} cannot be read: {_first_line(error)}") from error


def on_one_device(shapes: Any, device: jax.Device | None = None) -> Any:
    """ShapeDtypeStructs of `shapes`, whole on `device`, or the first one of this process."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0] if device is None else device)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


class _Found(NamedTuple):
    """A checkpoint: its step, and the measures saved with it, None without."""

    step: int
    metrics: dict[str, Any] | None


class _Always:
    """Orbax save policy: the loop decides when to save."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        return True


def _best_index(checkpoints) -> int | None:
    """Index of the best checkpoint, the later one of equals; None where none carries a measure."""
    scored = [(i, c.metrics) for i, c in enumerate(checkpoints) if c.metrics and "value" in c.metrics]
    if not scored:
        return None
    sign = 1 if scored[-1][1]["order"] == "max" else -1
    return max(scored, key=lambda item: (sign * item[1]["value"], item[0]))[0]


def _numbered(path: Any) -> list[int]:
    """Steps that have a directory in `path`, ascending."""
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal()) if path.is_dir() else []


def _in_bucket(path: Any) -> bool:
    """Whether nothing there can be renamed: a directory then is whole when Orbax has marked it, last of all."""
    return str(path).startswith("gs://")


def _finished(path: Any) -> list[int]:
    """Those of `_numbered` that were saved to the end, and not begun to be deleted."""
    marked = _in_bucket(path)
    return [step for step in _numbered(path) if not marked or (path / str(step) / _MARK).exists()]


def _delete(paths: list[Any]) -> None:
    """Deletes checkpoints. One whose deletion does not come to its end is none any more."""
    for path in map(epath.Path, paths):
        try:
            if _in_bucket(path):
                (path / _MARK).unlink()
            else:
                path = path.rename(path.with_name(f"{path.name}{_DELETED}"))
            path.rmtree()
        except Exception as error:  # each store has its own kinds
            raise OSError(f"cannot delete the checkpoint {path}: {_first_line(error)}") from error


def _context(partial: bool = False, alone: bool = False) -> ocp.Context:
    context = ocp.Context()
    if alone and jax.process_count() > 1:  # Orbax would wait for the others
        me = jax.process_index()
        context.multiprocessing.primary_host = me
        context.multiprocessing.active_processes = {me}
        context.multiprocessing.barrier_sync_key_prefix = f"alone_{me}"
    context.pytree.loading.partial_load = partial
    # Made in the background, a directory that cannot be made keeps the process from ending for 5 minutes.
    context.asynchronous.create_directories_asynchronously = False
    return context


def _leaves(tree: Any) -> dict[str, Any]:
    """`{"params/a/kernel": leaf}`; a State has the same names as the dicts by which Orbax describes it."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def check_shapes(want: Any, saved: Any, path: Any) -> None:
    """Raises ValueError, which lists the differences, unless the trees have the same names, shapes and dtypes."""
    want, saved = _leaves(want), _leaves(saved)
    lines = [f"{name}: not in the checkpoint" for name in want if name not in saved]
    lines += [f"{name}: only in the checkpoint" for name in saved if name not in want]
    for name, leaf in want.items():
        other = saved.get(name)
        if other is not None and (tuple(leaf.shape), np.dtype(leaf.dtype)) != (
            tuple(other.shape), np.dtype(other.dtype),
        ):  # fmt: skip
            lines.append(
                f"{name}: the checkpoint has {np.dtype(other.dtype)} {tuple(other.shape)}, "
                f"the configuration gives {np.dtype(leaf.dtype)} {tuple(leaf.shape)}"
            )
    if lines:
        more = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise ValueError(f"{path} does not fit the model:\n  " + "\n  ".join(lines[:8] + more))


def _first_line(error: BaseException) -> str:
    """The error in one line; of a long one its two ends, where the kind and the reason stand."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-160:]}"
