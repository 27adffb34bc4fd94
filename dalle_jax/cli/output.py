"""Output paths of the commands, checked before the work starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dalle_jax.pipelines import ImageTokenizer


def directory(path: str) -> Path:
    """Create the directory `path` if it is missing.

    Raises:
        ValueError: it is a file.
        OSError: it cannot be written.
    """
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {path} is a file; want a directory, new or existing")
    _check_writable(out, path)
    return out


def new_directory(path: str) -> Path:
    """Check that the directory `path` is new or empty, without creating it.

    Raises:
        ValueError: it is neither.
    """
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists; want a directory that is new or empty")
    return out


def file(path: str) -> Path:
    """Check that the file `path` can be written, and create its directory.

    Raises:
        ValueError: it is a directory.
        OSError: it cannot be written.
    """
    out = Path(path)
    if out.is_dir():
        raise ValueError(f"--out {path} is a directory; want the name of a file, e.g. {out / 'codes.npz'}")
    _check_writable(out.parent, path)
    return out


def _check_writable(folder: Path, path: str) -> None:
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write --out {path}: {error.strerror or error}; choose another --out"
        ) from error


def tokenizer_summary(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """Return the entries of `--json` about the image tokenizer of codes."""
    cfg = tokenizer.config
    return {"image_size": cfg.image_size, "vocab": cfg.vocab, "tokenizer": tokenizer.fingerprint}
