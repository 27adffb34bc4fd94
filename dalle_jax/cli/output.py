"""Where verbs write: checked before the work begins, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dalle_jax.pipelines import ImageTokenizer


def directory(path: str) -> Path:
    """Makes the directory `path` if it is missing. Raises ValueError for a file, OSError if unwritable."""
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {path} is a file; want a directory, new or existing")
    _try(out, path)
    return out


def new_directory(path: str) -> Path:
    """Checks that the directory `path` is new or empty; makes nothing. Raises ValueError if it is not."""
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already; want a directory that is new or empty")
    return out


def file(path: str) -> Path:
    """Checks that the file `path` can be written. Raises ValueError for a directory, OSError if it cannot."""
    out = Path(path)
    if out.is_dir():
        raise ValueError(f"--out {path} is a directory; want the name of a file, e.g. {out / 'codes.npz'}")
    _try(out.parent, path)
    return out


def _try(folder: Path, path: str) -> None:
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
    """What `--json` prints of the tokenizer that made or read codes."""
    cfg = tokenizer.config
    return {"image_size": cfg.image_size, "vocab": cfg.vocab, "tokenizer": tokenizer.fingerprint}
