"""Run directories in a bucket: `gs://BUCKET/RUN` wherever a run directory is asked for (`s3://` with s3fs, too).

Objects can be neither appended to nor renamed in one stroke. So each process keeps a mirror of the run's small files
in a temporary directory: filled from the bucket when the run is opened, copied back by the first process whenever
it has written what must last (`push`). Checkpoints are not mirrored: all processes write and read them in the bucket.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

_MIRRORED = (
    "config.json",
    "text_tokenizer.model",
    "metrics.jsonl",
    "model.safetensors",
)  # and tokenizer/; others only go up
_mirrors: dict[str, Path] = {}
_known: dict[Path, tuple[int, int]] = {}  # size and time of files that the bucket has


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def remote_path(url: str) -> Any:
    """`url` as a path-like object. Raises ValueError where no package serves its kind."""
    from etils import epath

    try:
        path = epath.Path(url)
        path.exists()
    except ImportError as error:
        raise ValueError(f"{url} wants a package (for gs://, pip install gcsfs): {error}") from error
    except Exception as error:
        raise OSError(f"cannot reach {url}: {type(error).__name__}: {error}") from error
    return path


def local_dir(path: str | Path) -> Path:
    """A run directory on local disk: `path` itself, or this process's mirror of a URL."""
    if not is_url(path):
        return Path(path)
    url = str(path).rstrip("/")
    if url not in _mirrors:
        there = remote_path(url)
        mirror = Path(tempfile.mkdtemp(prefix="dalle_jax_run_"))
        atexit.register(shutil.rmtree, mirror, ignore_errors=True)
        _download(there, mirror)
        _mirrors[url] = mirror
    return _mirrors[url]


def _url_of(run_dir: Path) -> str | None:
    return next((url for url, mirror in _mirrors.items() if mirror == run_dir), None)


def checkpoints_of(run_dir: Path) -> Any:
    """Where the checkpoints of a run are, whose `local_dir` is `run_dir`."""
    url = _url_of(run_dir)
    return run_dir / "checkpoints" if url is None else remote_path(f"{url}/checkpoints")


def pull(run_dir: Path) -> None:
    """Brings what other processes have pushed; does nothing for a run on disk."""
    url = _url_of(run_dir)
    if url is not None:
        _download(remote_path(url), run_dir)


def push(run_dir: Path) -> None:
    """Copies every file that has changed to the bucket; does nothing for a run on disk."""
    url = _url_of(run_dir)
    if url is None:
        return
    there = remote_path(url)
    for file in sorted(p for p in run_dir.rglob("*") if p.is_file()):
        stat = file.stat()
        if (file.name.startswith(".") and file.name.endswith(".tmp")) or _known.get(file) == _mark(stat):
            continue
        goal = there / file.relative_to(run_dir).as_posix()
        try:
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_bytes(file.read_bytes())
        except Exception as error:  # each store has its own kinds
            raise OSError(f"cannot write {goal}: {type(error).__name__}: {error}") from error
        _known[file] = _mark(stat)


def _mark(stat: Any) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _download(there: Any, mirror: Path) -> None:
    try:
        names = [name for name in _MIRRORED if (there / name).exists()]
        if (there / "tokenizer").is_dir():
            names += [str(p.relative_to(there)) for p in _files(there / "tokenizer")]
        for name in names:
            file = mirror / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((there / name).read_bytes())
            _known[file] = _mark(file.stat())
    except Exception as error:
        raise OSError(f"cannot read {there}: {type(error).__name__}: {error}") from error


def _files(there: Any) -> list[Any]:
    found = []
    for path in there.iterdir():
        found += _files(path) if path.is_dir() else [path]
    return found
