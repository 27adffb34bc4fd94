"""Opening a run directory for training: new, or the same run resumed. layout.py lists its files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from dalle_jax.checkpoint import remote_dir
from dalle_jax.checkpoint.layout import CONFIG_FILE
from dalle_jax.config import TrainConfig, from_json, to_json
from dalle_jax.files.atomic import write_atomic

# Fields that may change when a run is resumed. None of them changes what a training step computes from its state,
# except `steps`, which also stretches the learning rate schedule where optim.decay_steps is None.
RESUMABLE_FIELDS = (
    "run", "steps", "log_every", "eval_every", "eval_rows", "sample_every", "save_every", "max_checkpoints", "mesh",
    "distributed", "profile", "compilation_cache_dir", "compiler_options", "data.num_threads", "data.num_workers",
    "data.prefetch",
)  # fmt: skip


def read_run_config(path: str | Path) -> TrainConfig:
    """Read the configuration of a run directory.

    Raises:
      FileNotFoundError: The directory or its config.json does not exist.
      ValueError: config.json is not a configuration of this version.
    """
    local = remote_dir.local_dir(path)
    if not local.exists():
        raise FileNotFoundError(f"Expected a run directory, got {path}, which does not exist.")
    file = local / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"Expected a run directory, got {path} without config.json.")
    try:
        return from_json(TrainConfig, file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected a configuration of this version in {file}. {error}") from error


def open_run_dir(config: TrainConfig) -> Path:
    """Make the run directory of `config`, or check that it holds the same run.

    A missing or empty directory becomes a run directory. One that holds a run of the same configuration is resumed:
    only `RESUMABLE_FIELDS` may differ, and config.json takes their new values. All processes call; the first one
    writes.

    Returns:
      The directory; for a URL its mirror on local disk.

    Raises:
      ValueError: The directory holds another run or other files. It is unchanged.
      OSError: The directory cannot be made.
    """
    if not config.run:
        raise ValueError("Expected a run directory for all outputs, got none. Use --run DIR.")
    path = remote_dir.local_dir(config.run)
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected a new or existing run directory, got the file {path}. Use another --run.")
    file = path / CONFIG_FILE
    if file.exists():
        _check_same_run(path, config)
    elif path.is_dir():
        files = sorted(p.name for p in path.iterdir() if not p.name.startswith(f".{CONFIG_FILE}."))
        if files:
            more = ", ..." if len(files) > 5 else ""
            raise ValueError(
                "Expected an empty directory or a run, "
                f"got {path} without config.json but with {', '.join(files[:5])}{more}. "
                "Use another --run."
            )
    if jax.process_index() == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the run directory {path}: {error.strerror or error}") from error
        # The place of this process among the others is no part of the run.
        distributed = dataclasses.replace(
            config.distributed, coordinator_address=None, num_processes=None, process_id=None
        )
        text = to_json(dataclasses.replace(config, distributed=distributed))
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_atomic(file, text)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("open_run_dir")
        if not remote_dir.is_url(config.run) and not file.exists():
            raise ValueError(
                f"Expected {file} of process 0 on the disk of process {jax.process_index()}, got none. "
                "Use a run directory on a disk that all processes share, or gs://BUCKET/RUN."
            )
    return path


@contextlib.contextmanager
def opened_run_dir(config: TrainConfig) -> Generator[Path]:
    """Yield `open_run_dir(config)`; if the block fails before it writes, a new directory is removed.

    So an error in the preparation, such as a missing data file, leaves no empty run directory.
    """
    path = remote_dir.local_dir(config.run)
    is_new_run = not (path / CONFIG_FILE).exists()
    is_new_dir = is_new_run and not path.exists()
    open_run_dir(config)
    try:
        yield path
    except BaseException:
        if is_new_run and jax.process_index() == 0 and [p.name for p in path.iterdir()] == [CONFIG_FILE]:
            (path / CONFIG_FILE).unlink()
            if is_new_dir:
                path.rmdir()
        raise


def sync_run_dir(run_dir: Path) -> None:
    """Wait until all processes can read what the first one has written to the run directory; all call.

    A remote directory is copied: the first process uploads, the others download.
    """
    if jax.process_index() == 0:
        remote_dir.upload_run(run_dir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("sync_run_dir")
        if jax.process_index() > 0:
            remote_dir.download_run(run_dir)


def _check_same_run(path: Path, config: TrainConfig) -> None:
    differences = _differences(read_run_config(path), config)
    if differences:
        lines = "\n  ".join(differences)
        checkpoints = remote_dir.checkpoints_of(path)
        has_checkpoint = checkpoints.is_dir() and any(checkpoints.iterdir())
        delete = "" if has_checkpoint else ", or delete that directory, which has no checkpoint yet"
        raise ValueError(
            f"{path} holds another run:\n  {lines}\n"
            f"Choose another --run, or give the run's own values to resume it{delete}"
        )


def _differences(run: TrainConfig, command: TrainConfig) -> list[str]:
    """`field: run has X, command gives Y` for each field that must not differ."""
    if run.model.kind != command.model.kind:
        return [f"stage: run has {run.model.kind}, command gives {command.model.kind}"]
    old, new = _flatten(dataclasses.asdict(run)), _flatten(dataclasses.asdict(command))
    lines = []
    for name in [*old, *(n for n in new if n not in old)]:
        resumable = any(name == f or name.startswith(f + ".") for f in RESUMABLE_FIELDS)
        if not resumable and old.get(name) != new.get(name):
            lines.append(f"{name}: run has {old.get(name)!r}, command gives {new.get(name)!r}")
    return lines


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves
