"""One training at a time in a run directory: a lock that the system takes back, however the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from dalle_jax.checkpoint import remote_dir


@contextlib.contextmanager
def run_lock(run: str, *, patience: float = 10.0) -> Iterator[None]:
    """Keeps other trainings on this machine out of a run directory until the block ends, or the process, however.

    Two would delete what the other one is saving. One that is just ending is waited for, `patience` seconds. No effect
    for a URL, nor on a file system without locks of directories, as NFS. Raises ValueError for one that stays."""
    path, handle = remote_dir.local_dir(run), None
    made = bool(run) and not path.exists()
    if run and not remote_dir.is_url(run) and jax.process_index() == 0:
        with contextlib.suppress(OSError):  # told where the directory is needed
            path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if handle is not None:
            _lock(handle, path, time.monotonic() + patience)
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if made:
            with contextlib.suppress(OSError):  # it has files: the run was begun
                path.rmdir()


def _lock(handle: int, path: Path, until: float) -> None:
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise ValueError(
                    f"another training is writing in {path}; wait for it or stop it, or choose another --run"
                ) from None
            time.sleep(0.2)
        except OSError:  # no such locks here
            return None
