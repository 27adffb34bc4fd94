"""Where rows come from: a picture and its captions by index, one file for each kind of source.

A source is random access and safe to read from many threads; the pipeline above decides the order. rows.py
says what a source is and how broken pictures are replaced and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dalle_jax import config
from dalle_jax.data.sources.arrays import ArrayDataset
from dalle_jax.data.sources.dataset import Captions, Dataset, Split, read_excluded_names
from dalle_jax.data.sources.folder import FolderDataset
from dalle_jax.data.sources.mixture import MixtureDataset
from dalle_jax.data.sources.scenes import EVAL_SCENES, SCENE_CAPTIONS, SceneDataset
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
    "TarDataset",
    "TfdsDataset",
    "infer_source",
    "iter_captions",
    "open_source",
]  # fmt: skip


def open_source(
    source: config.SourceConfig, split: Split, *, languages: Sequence[str] = ("en", "zh")
) -> Dataset:
    """The rows of one split.

    languages: of the captions wanted. A row that has some of them is used with what it has, a row with none
        is unusable. None asked: every row with a picture is used, whether it has captions or not.

    Records that `exclude` of a source names are left out of its training split. Raises FileNotFoundError or
    ValueError, saying what was wanted and what to do, for paths that are not there, files that are not whole, splits
    without rows, more unusable records than `max_bad_fraction`, and a list to exclude that names none of them.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}; want 'train' or 'eval'")
    rows = _open(source, split, languages)
    if split == "train" and getattr(source, "exclude", None) is not None:
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
            return MixtureDataset(source, _parts(source, split, languages), split)
    raise ValueError(f"no source for a {type(source).__name__}; want one of config.SourceConfig")


def _parts(mixture: config.MixtureSource, split: Split, languages: Sequence[str]) -> list[Dataset]:
    parts = []
    for i, part in enumerate(mixture.parts):
        try:
            parts.append(open_source(part, split, languages=languages))
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"data.source.parts[{i}] ({part.kind}): {error}") from None
    return parts


def iter_captions(source: Dataset, count: int) -> Iterator[str]:
    """About `count` captions from rows spread evenly over the source, every language of a row; for a
    vocabulary."""
    first = sum(len(texts) for texts in source.captions(0).values())
    rows = min(len(source), -(-count // max(1, first)))
    left = count
    for row in range(rows):
        for texts in source.captions(row * len(source) // rows).values():
            yield from texts[:left]
            left -= len(texts[:left])


def infer_source(path: str) -> config.SourceConfig:
    """How to read what is at `path`, by what it is: a folder of pictures, a TFDS directory or name, tar files,
    an npz file. Raises FileNotFoundError if there is nothing and it is no TFDS name."""
    here = Path(path).expanduser()
    if here.is_dir():
        prepared = (here / "dataset_info.json").is_file()
        return config.TfdsSource(path=path) if prepared else config.FolderSource(path=path)
    if path.endswith(".npz"):
        return config.ArraysSource(path=path)
    if ".tar" in path:
        return config.TarSource(path=path)
    if here.exists():
        raise ValueError(f"{path} is no source of pictures; want a folder, .tar or .npz, or a TFDS directory")
    if path and path.replace("_", "").replace("/", "").replace(":", "").replace(".", "").isalnum():
        return config.TfdsSource(path=path)
    raise FileNotFoundError(
        f"no data at {path!r}; want a folder, tar files, an .npz, or a TFDS directory or name"
    )
