"""Output paths of the commands, checked before the work starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax.data import images
from dalle_jax.pipelines import TokenizerPipeline


def output_directory(path: str) -> Path:
    """Create the directory `path` if it is missing.

    Raises:
        ValueError: it is a file.
        OSError: it cannot be written.
    """
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise ValueError(f"Expected a new or existing directory for --out, got the file {path}.")
    _check_writable(out, path)
    return out


def new_output_directory(path: str) -> Path:
    """Check that the directory `path` is new or empty, without creating it.

    Raises:
        ValueError: it is neither.
    """
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"Expected a new or empty directory for --out, got the existing {out}.")
    return out


def output_file(path: str) -> Path:
    """Check that the file `path` can be written, and create its directory.

    Raises:
        ValueError: it is a directory.
        OSError: it cannot be written.
    """
    out = Path(path)
    if out.is_dir():
        raise ValueError(
            f"Expected the name of a file for --out, got the directory {path}. Use e.g. {out / 'codes.npz'}."
        )
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
            f"Expected a writable --out, got {path}: {error.strerror or error}. Use another --out."
        ) from error


class LabeledGrid:
    """A PNG file with all images and their labels, in rows of `columns`."""

    def __init__(self, path: Path, columns: int):
        self.path, self._columns = path, columns

    def save(self, pixels: list[np.ndarray], labels: list[str]) -> None:
        """Write images, uint8 (H, W, 3) each, small ones enlarged by a whole number."""
        scale = max(1, 128 // pixels[0].shape[0])
        grid = images.image_grid(np.stack(pixels), self._columns, labels=labels, scale=scale)
        images.save_png(self.path, grid)


def tokenizer_summary(tokenizer: TokenizerPipeline) -> dict[str, Any]:
    """What `--json` prints of the tokenizer that made or read codes."""
    cfg = tokenizer.config
    return {"image_size": cfg.image_size, "vocab": cfg.vocab, "tokenizer": tokenizer.fingerprint}
