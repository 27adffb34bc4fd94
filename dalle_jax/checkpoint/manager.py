"""Checkpoints of a run; the only file that imports Orbax (its v1 interface).

A save is atomic: Orbax writes to a temporary directory and renames it, so a directory named by a step is complete. A
deletion is atomic too: it begins with a rename. A checkpoint that cannot be read raises an error with its path; there
is no fallback to an older checkpoint or to new parameters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

# Orbax logs the traceback of each failing thread; every failure reaches the caller as an error.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)

_MARK = "commit_success.txt"
_DELETED = ".deleted"

BestMetric = tuple[str, Literal["min", "max"]]


class CheckpointManager:
    """The checkpoints of one run: saved in the background; the last `keep` and the best one are kept.

    All processes call every method from the main thread: each writes the arrays on its devices, and the first one
    finishes the directory.
    """

    def __init__(
        self, path: Any, keep: int | None = None, best: BestMetric | None = None, alone: bool = False
    ):
        """Open the directory.

        Args:
          path: The directory, made if missing: a Path, or `remote_dir.remote_path` of a URL.
          keep: The number of latest checkpoints to keep; None opens the directory read-only and lists it once.
          best: The name of a metric, and whether its minimum or its maximum is best.
          alone: This process reads without the others.

        Raises:
          FileNotFoundError: There is no directory to read.
          OSError: The directory cannot be opened, or a checkpoint is damaged.
        """
        self.path = path.absolute() if isinstance(path, Path) else path
        self.keep, self.best_metric, self.alone = keep, best, alone
        self._pending: tuple[_Checkpoint, Any] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._deletion: Future[None] | None = None
        if keep is None and not self.path.is_dir():
            raise FileNotFoundError(
                f"Expected the checkpoints/ of a run, got {self.path}, which is not a directory."
            )
        # Read-only there is no Checkpointer: it makes the directory, which one of several processes cannot do alone.
        self._orbax = None if keep is None else self._open()
        self._checkpoints = [self._read_metrics(step) for step in _finished_steps(self.path)]

    def _open(self) -> ocp.training.Checkpointer:
        try:
            if (
                self.path.is_dir() and jax.process_index() == 0
            ):  # a killed process did not finish their deletion
                for deleted in [p for p in self.path.iterdir() if p.name.endswith(_DELETED)]:
                    epath.Path(deleted).rmtree()
            return ocp.training.Checkpointer(
                self.path,
                context=_context(alone=self.alone),
                cleanup_tmp_directories=True,
                save_decision_policy=_Always(),
            )
        except (OSError, ValueError) as error:
            for step in reversed(_all_steps(self.path)):
                self._read_metrics(step)
            raise OSError(f"cannot open the checkpoints in {self.path}: {_first_line(error)}") from error

    def _read_metrics(self, step: int) -> _Checkpoint:
        """Read the metrics of a checkpoint. Raises OSError if they are damaged."""
        file = self.path / str(step) / "metrics" / "metrics"
        try:
            metrics = json.loads(file.read_text()) if file.exists() else None
            if not isinstance(metrics, dict | None):
                raise ValueError(f"{file.name} is no JSON object")
        except (OSError, ValueError) as error:
            raise self._read_error(step, error) from error
        return _Checkpoint(step, metrics)

    @property
    def steps(self) -> list[int]:
        """The steps with a checkpoint, ascending."""
        return [c.step for c in self._checkpoints]

    @property
    def latest(self) -> int | None:
        """The last step with a checkpoint, or None."""
        return self.steps[-1] if self.steps else None

    @property
    def best(self) -> int | None:
        """The step with the best metric; None if no checkpoint has one."""
        index = _best_index(self._checkpoints)
        return None if index is None else self.steps[index]

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Start to save `state`; return once it is copied off the device. It is written in the background.

        Args:
          step: The training step of `state`.
          state: A tree of arrays.
          metrics: The metrics of the evaluation at this step, or None.

        Raises:
          OSError: The previous save, which is waited for, or this one failed.
        """
        self.wait()
        assert self._orbax is not None  # not opened read-only
        record: dict[str, Any] | None = None
        if self.best_metric and metrics and math.isfinite(metrics.get(self.best_metric[0], math.nan)):
            name, order = self.best_metric
            record = {"metric": name, "order": order, "value": metrics[name]}
        try:
            response = self._orbax.save_async(step, state, metrics=record, force=True)
            self._pending = (_Checkpoint(step, record), response)
        except Exception as error:
            raise self._save_error(step, error) from error

    def check(self) -> None:
        """Check the save in the background without waiting. Raises OSError if it failed."""
        self._collect(timeout=0)

    def wait(self) -> None:
        """Wait until the last save is on disk and old checkpoints are deleted. Raises OSError if that failed."""
        self._collect(timeout=None)
        self._finish_deletion()

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
        self._checkpoints = [*(c for c in self._checkpoints if c.step != saved.step), saved]
        self._delete_old()

    def _delete_old(self) -> None:
        """Drop all but the latest `keep` and the best; the first process deletes them in the background."""
        assert self.keep is not None
        best, first_kept = self.best, len(self._checkpoints) - self.keep
        kept = [c for i, c in enumerate(self._checkpoints) if i >= first_kept or c.step == best]
        old = [self.path / str(c.step) for c in self._checkpoints if c not in kept]
        self._checkpoints = kept
        if old and jax.process_index() == 0:
            self._finish_deletion()
            self._deletion = self._thread.submit(_delete, old)

    def _finish_deletion(self) -> None:
        deletion, self._deletion = self._deletion, None
        if deletion is not None:
            deletion.result()

    def _save_error(self, step: int, error: Exception) -> OSError:
        intact = [str(s) for s in _all_steps(self.path) if s != step]
        before = f"intact earlier steps: {', '.join(intact)}" if intact else "no step was saved before"
        return OSError(
            f"cannot save the checkpoint of step {step} in {self.path}: {_first_line(error)} ({before}). "
            "Free disk space or choose a writable directory, then run the same command again to resume"
        )

    def load(self, step: int, abstract: Any, partial: bool = False) -> Any:
        """Load the state of `step`.

        Args:
          step: One of `steps`.
          abstract: The tree of the state, ShapeDtypeStructs with the shardings of the result.
          partial: `abstract` is a dict of some top entries (`{"params": ...}`); the others are not read.

        Returns:
          The state.

        Raises:
          ValueError: It names the leaves whose name, shape or dtype differ.
          OSError: The checkpoint cannot be read.
        """
        saved = self.shapes(step)
        if partial:
            saved = {name: saved.get(name) for name in abstract}
        check_checkpoint_shapes(abstract, saved, self.path / str(step))
        try:
            with _context(partial, self.alone):
                return ocp.load(epath.Path(self.path / str(step)), abstract)
        except Exception as error:
            raise self._read_error(step, error) from error

    def shapes(self, step: int) -> Any:
        """Return the tree of a saved state, leaves with `.shape` and `.dtype`, without reading an array.

        Raises:
          FileNotFoundError: There is no checkpoint of this step.
          OSError: The checkpoint cannot be read.
        """
        if step not in self.steps:
            raise FileNotFoundError(
                f"Expected a step of {self.steps}, the checkpoints in {self.path}, got {step}."
            )
        try:
            tree = ocp.metadata(self.path / str(step)).metadata
        except Exception as error:
            raise self._read_error(step, error) from error
        if not _leaves(tree):
            raise self._read_error(step, ValueError("it lists no arrays"))
        return tree

    def _read_error(self, step: int, error: Exception) -> OSError:
        earlier = [s for s in _all_steps(self.path) if s < step]
        then = f"resume from step {earlier[-1]}" if earlier else "start from step 0, as no earlier one exists"
        return OSError(
            f"the checkpoint {self.path / str(step)} cannot be read, it is damaged or incomplete: "
            f"{_first_line(error)}. Delete that directory to {then}"
        )

    def close(self) -> None:
        """Wait for the last save and close the directory. Raises OSError if the save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # a failed save has raised already
                self._thread.shutdown()
                if self._orbax is not None:
                    self._orbax.close()


def on_one_device(shapes: Any, device: jax.Device | None = None) -> Any:
    """Return ShapeDtypeStructs like `shapes`, unsharded on `device`, or on the first one of this process."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0] if device is None else device)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


class _Checkpoint(NamedTuple):
    """A checkpoint: its step, and the best-metric record saved with it, or None."""

    step: int
    metrics: dict[str, Any] | None


class _Always:
    """Orbax save policy: the training loop decides when to save."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        return True


def _best_index(checkpoints: list[_Checkpoint]) -> int | None:
    """Index of the best checkpoint, the later one of equals; None if none has a metric."""
    measured = [(i, c.metrics) for i, c in enumerate(checkpoints) if c.metrics and "value" in c.metrics]
    if not measured:
        return None
    sign = 1 if measured[-1][1]["order"] == "max" else -1
    return max(measured, key=lambda item: (sign * item[1]["value"], item[0]))[0]


def _all_steps(path: Any) -> list[int]:
    """Steps that have a directory in `path`, ascending."""
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal()) if path.is_dir() else []


def _in_bucket(path: Any) -> bool:
    """Whether renames are not atomic there: Orbax marks a complete directory with a last file."""
    return str(path).startswith("gs://")


def _finished_steps(path: Any) -> list[int]:
    """The steps whose directory is complete and not being deleted."""
    marked = _in_bucket(path)
    return [step for step in _all_steps(path) if not marked or (path / str(step) / _MARK).exists()]


def _delete(paths: list[Any]) -> None:
    """Delete checkpoints. One whose deletion is interrupted is no longer listed."""
    for path in map(epath.Path, paths):
        try:
            if _in_bucket(path):
                (path / _MARK).unlink()
            else:
                path = path.rename(path.with_name(f"{path.name}{_DELETED}"))
            path.rmtree()
        except Exception as error:  # each store has its own errors
            raise OSError(f"cannot delete the checkpoint {path}: {_first_line(error)}") from error


def _context(partial: bool = False, alone: bool = False) -> ocp.Context:
    context = ocp.Context()
    if alone and jax.process_count() > 1:  # else Orbax waits for the others
        me = jax.process_index()
        context.multiprocessing.primary_host = me
        context.multiprocessing.active_processes = {me}
        context.multiprocessing.barrier_sync_key_prefix = f"alone_{me}"
    context.pytree.loading.partial_load = partial
    # In the background, a directory that cannot be made delays the end of the process by 5 minutes.
    context.asynchronous.create_directories_asynchronously = False
    return context


def _leaves(tree: Any) -> dict[str, Any]:
    """`{"params/a/kernel": leaf}`; a TrainState has the same names as the dicts that Orbax restores."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def check_checkpoint_shapes(expected: Any, saved: Any, path: Any) -> None:
    """Check that two trees have the same names, shapes and dtypes.

    Raises:
      ValueError: It lists the differences.
    """
    want, have = _leaves(expected), _leaves(saved)
    lines = [f"{name}: not in the checkpoint" for name in want if name not in have]
    lines += [f"{name}: only in the checkpoint" for name in have if name not in want]
    for name, leaf in want.items():
        other = have.get(name)
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
    """The error in one line; of a long one the two ends, which name the kind and the reason."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-160:]}"
