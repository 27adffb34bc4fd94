"""Run directories in cloud storage: `gs://BUCKET/RUN` in place of a run directory (`s3://` with s3fs too).

Objects can be neither appended to nor renamed atomically. So each process keeps a mirror of the run's small files in a
temporary directory: downloaded when the run is opened, uploaded by the first process (`push`) at each save.
Checkpoints are not mirrored: all processes write and read them in the bucket.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dalle_jax.checkpoint.layout import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    IMAGE_TOKENIZER_DIR,
    METRICS_FILE,
    PARAMS_FILE,
    TEXT_TOKENIZER_FILE,
)

# What is downloaded, with image_tokenizer/; other files are only uploaded.
_DOWNLOADED = (CONFIG_FILE, TEXT_TOKENIZER_FILE, METRICS_FILE, PARAMS_FILE)
_OBJECT_STORES = ("gs://", "s3://")
_mirrors: dict[str, Path] = {}
_uploaded: dict[Path, tuple[int, int]] = {}  # size and modification time of the files that the bucket has


def is_url(path: str | Path) -> bool:
    """Return whether `path` is a URL."""
    return "://" in str(path)


def remote_path(url: str) -> Any:
    """Return `url` as a path object.

    Raises:
      ValueError: The kind of URL is not one of object storage, or the package that serves it is not installed.
      OSError: The URL cannot be reached.
    """
    if not url.startswith(_OBJECT_STORES):
        raise ValueError(
            f"Expected a local path or a URL that begins with {' or '.join(_OBJECT_STORES)}, got {url}."
        )
    from etils import epath

    try:
        path = epath.Path(url)
        path.exists()
    except ImportError as error:
        raise ValueError(f"{url} needs a package (for gs://, pip install gcsfs): {error}") from error
    except Exception as error:
        raise OSError(f"cannot reach {url}: {type(error).__name__}: {error}") from error
    return path


def local_dir(path: str | Path) -> Path:
    """Return a run directory on local disk: `path` itself, or the mirror of a URL in this process."""
    if not is_url(path):
        return Path(path)
    url = str(path).rstrip("/")
    if url not in _mirrors:
        remote = remote_path(url)
        mirror = Path(tempfile.mkdtemp(prefix="dalle_jax_run_"))
        atexit.register(shutil.rmtree, mirror, ignore_errors=True)
        _download(remote, mirror)
        _mirrors[url] = mirror
    return _mirrors[url]


def _url_of(run_dir: Path) -> str | None:
    return next((url for url, mirror in _mirrors.items() if mirror == run_dir), None)


def checkpoints_of(run_dir: Path) -> Any:
    """Return the path of the checkpoints of the run whose `local_dir` is `run_dir`."""
    url = _url_of(run_dir)
    return run_dir / CHECKPOINTS_DIR if url is None else remote_path(f"{url}/{CHECKPOINTS_DIR}")


def download_run(run_dir: Path) -> None:
    """Download the files that other processes have uploaded; no effect for a run on disk."""
    url = _url_of(run_dir)
    if url is not None:
        _download(remote_path(url), run_dir)


def upload_run(run_dir: Path) -> None:
    """Upload every file that has changed; no effect for a run on disk. Raises OSError if an upload fails."""
    url = _url_of(run_dir)
    if url is None:
        return
    remote = remote_path(url)
    for file in sorted(p for p in run_dir.rglob("*") if p.is_file()):
        stat = file.stat()
        is_temporary = file.name.startswith(".") and file.name.endswith(".tmp")  # of files/atomic.py
        if is_temporary or _uploaded.get(file) == _version(stat):
            continue
        target = remote / file.relative_to(run_dir).as_posix()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        except Exception as error:  # each store has its own errors
            raise OSError(f"cannot write {target}: {type(error).__name__}: {error}") from error
        _uploaded[file] = _version(stat)


def _version(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _download(remote: Any, mirror: Path) -> None:
    try:
        names = [name for name in _DOWNLOADED if (remote / name).exists()]
        if (remote / IMAGE_TOKENIZER_DIR).is_dir():
            names += [str(p.relative_to(remote)) for p in _files(remote / IMAGE_TOKENIZER_DIR)]
        for name in names:
            file = mirror / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((remote / name).read_bytes())
            _uploaded[file] = _version(file.stat())
    except Exception as error:  # each store has its own errors
        raise OSError(f"cannot read {remote}: {type(error).__name__}: {error}") from error


def _files(directory: Any) -> list[Any]:
    files = []
    for path in directory.iterdir():
        files += _files(path) if path.is_dir() else [path]
    return files
