"""Atomic writes: a reader, or a process that resumes after a crash, finds the old content or the new one, never a
part."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, sync: bool = True) -> Generator[Path]:
    """Yield a hidden path beside `path`, which replaces `path` at the end of the block.

    The block writes a file or a directory there. Parent directories are made. If the block fails, what it wrote is
    removed and `path` is unchanged.

    Args:
      path: A file, which may exist, or a directory, which must be missing or empty.
      sync: Flush a file to the disk before it replaces `path`, so that it survives a power failure.

    Raises:
      OSError: `cannot write PATH: reason`, also for an OSError of the block.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync and temporary.is_file():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise OSError(f"cannot write {path}: {_reason(error)}") from error
    except BaseException:
        _remove(temporary)
        raise


def write_atomic(path: str | os.PathLike, data: str | bytes | memoryview, *, sync: bool = True) -> None:
    """Write a file atomically; text is encoded as UTF-8. Raises what `atomic_path` raises."""
    with atomic_path(path, sync=sync) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Write an uncompressed npz file atomically. Raises what `atomic_path` raises."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # ty: ignore[invalid-argument-type] no array is named allow_pickle


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only file system refuses to remove even a missing file
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _reason(error: OSError) -> str:
    """The reason of the system; of an atomic write within another one, that of the inner one."""
    while not error.strerror and isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error.strerror or str(error)
