"""Data sources: an image, its captions and its class by row index, one file for each kind of source.

A source is random access, and any number of threads may read it; the order of rows is up to the loader. `dataset.py`
has the protocol, `stored.py` the base class of sources of stored images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dalle_jax import config
from dalle_jax.data.sources.arrays import ArrayDataset
from dalle_jax.data.sources.dataset import Captions, Dataset, Split
from dalle_jax.data.sources.exclusions import read_excluded_names
from dalle_jax.data.sources.folder import FolderDataset
from dalle_jax.data.sources.mixture import MixtureDataset
from dalle_jax.data.sources.scenes import EVAL_SCENES, SCENE_CAPTIONS, SceneDataset
from dalle_jax.data.sources.stored import StoredDataset
from dalle_jax.data.sources.tar import TarDataset
from dalle_jax.data.sources.tfds import TfdsDataset

__all__ = [
    "EVAL_SCENES",
    "SCENE_CAPTIONS",
    "ArrayDataset",
    "Captions",
    "Dataset",
    "FolderDataset",
    "MixtureDataset",
    "SceneDataset",
    "Split",
    "StoredDataset",
    "TarDataset",
    "TfdsDataset",
    "infer_source",
    "open_source",
]


def open_source(
    source: config.SourceConfig, split: Split, *, languages: Sequence[str] = ("en", "zh")
) -> Dataset:
    """Open one split of a source.

    Args:
      source: The source. Records that its `exclude` names are replaced in the training split.
      split: "train" or "eval".
      languages: Languages of the captions. A row needs a caption in one of them; without languages every row with an
        image is used.

    Raises:
      FileNotFoundError: A path does not exist.
      ValueError: A file is damaged, a split has no rows, more records are unusable than `max_bad_fraction`, or
        `exclude` names none of the records.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"Expected split 'train' or 'eval', got {split!r}.")
    rows = _open(source, split, languages)
    if split == "train" and isinstance(source, config.StoredSource) and source.exclude is not None:
        names = read_excluded_names(source.exclude)
        try:
            rows.exclude(names)
        except ValueError as error:
            raise ValueError(f"data.source.exclude {source.exclude}: {error}") from None
    return rows


def _open(source: config.SourceConfig, split: Split, languages: Sequence[str]) -> Dataset:
    match source:
        case config.ScenesSource():
            return SceneDataset(source, split, languages=languages)
        case config.TarSource():
            return TarDataset(source, split, languages=languages)
        case config.FolderSource():
            return FolderDataset(source, split, languages=languages)
        case config.TfdsSource():
            return TfdsDataset(source, split, languages=languages)
        case config.ArraysSource():
            return ArrayDataset(source, split, languages=languages)
        case config.MixtureSource():
            return MixtureDataset(source, _open_parts(source, split, languages), split)
    raise ValueError(f"Expected one of config.SourceConfig, got a {type(source).__name__}.")


def _open_parts(mixture: config.MixtureSource, split: Split, languages: Sequence[str]) -> list[Dataset]:
    parts = []
    for i, part in enumerate(mixture.parts):
        try:
            parts.append(open_source(part, split, languages=languages))
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"data.source.parts[{i}] ({part.kind}): {error}") from None
    return parts


def infer_source(path: str) -> config.SourceConfig:
    """Return the configuration of the source at `path`.

    Args:
      path: A folder of images, tar files, an npz file, or the directory or name of a TFDS data set.

    Raises:
      ValueError: The file at `path` is of another kind.
      FileNotFoundError: `path` does not exist and is no TFDS name.
    """
    local = Path(os.path.expanduser(path))
    if local.is_dir():
        prepared = (local / "dataset_info.json").is_file()
        return config.TfdsSource(path=path) if prepared else config.FolderSource(path=path)
    if path.endswith(".npz"):
        return config.ArraysSource(path=path)
    if ".tar" in path:
        return config.TarSource(path=path)
    if local.exists():
        raise ValueError(f"Expected a folder, .tar, .npz, or TFDS directory of images, got {path}.")
    if path and path.replace("_", "").replace("/", "").replace(":", "").replace(".", "").isalnum():
        return config.TfdsSource(path=path)
    raise FileNotFoundError(
        "Expected a folder of images, tar files, an .npz file, or the directory or name of a TFDS data set, got "
        f"nothing at {path!r}. Use an existing path."
    )
