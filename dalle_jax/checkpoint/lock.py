"""The lock of a run directory: one training at a time; it is released when the process exits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path

import jax

from dalle_jax.checkpoint import remote_dir


@contextlib.contextmanager
def run_lock(run: str, *, timeout: float = 10.0) -> Generator[None]:
    """Lock a run directory against other trainings on this machine for the time of the block.

    Two trainings would delete each other's checkpoints. The lock has no effect for a URL, nor on a file system without
    locks of directories, such as NFS.

    Args:
      run: The run directory, which is made, or its URL.
      timeout: Seconds to wait for a training that is about to end.

    Raises:
      ValueError: Another training keeps the lock.
    """
    path, handle = remote_dir.local_dir(run), None
    is_new = bool(run) and not path.exists()
    if run and not remote_dir.is_url(run) and jax.process_index() == 0:
        with contextlib.suppress(OSError):  # open_run_dir raises it
            path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if handle is not None:
            _lock(handle, path, time.monotonic() + timeout)
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty: the run has started
                path.rmdir()


def _lock(handle: int, path: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"Expected no other training in {path}, got one. Wait for it, stop it or use another --run."
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without such locks
            return None
