"""Rows of a prepared TensorFlow Datasets directory in array_record or tfrecord format, read without TensorFlow.

A data set is captioned (a field of texts, as `captions/text` of coco_captions), labelled (`label`, whose class
names become captions by templates) or neither, which serves models without captions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax import config
from dalle_jax.data.images import BadImageError, ImageLimits
from dalle_jax.data.sources.dataset import (
    Captions,
    Split,
    StoredDataset,
    captions_from_fields,
    class_captions,
    expand_path,
)
from dalle_jax.data.sources.tfrecord import TfRecords


class TfdsDataset(StoredDataset):
    """The rows of one split, in the order of the data set."""

    def __init__(self, source: config.TfdsSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        super().__init__(
            source.max_bad_fraction, languages, ImageLimits(source.min_image_size, source.max_aspect_ratio)
        )
        import tensorflow_datasets as tfds

        self._config, self._directory = source, _directory(source)
        self._split = source.train_split if split == "train" else source.eval_split
        builder = tfds.builder_from_directory(str(self._directory))
        info = builder.info
        form = info.file_format and info.file_format.value
        if form not in ("array_record", "tfrecord"):
            raise ValueError(
                f"data.source.path: {self._directory} is in {form} format; want array_record or tfrecord: prepare it "
                "again with --file_format=array_record"
            )
        if source.image_field not in info.features:
            raise ValueError(
                f"{self._directory} has no field {source.image_field!r}; set data.source.image_field to one of "
                f"{', '.join(info.features)}"
            )
        self._captioned = source.captions_field in info.features or source.captions_zh_field in info.features
        if source.label_field in info.features:
            feature = info.features[source.label_field]
            names = getattr(feature, "names", None)
            if names:
                self.classes = tuple(names)
        if self._languages and not self._captioned and not self.classes:
            raise ValueError(
                f"{self._directory} has neither captions ({source.captions_field!r}) nor class labels "
                f"({source.label_field!r}), but captions are wanted; set data.source.captions_field to one of "
                f"{', '.join(info.features)}"
            )
        decoders = {source.image_field: tfds.decode.SkipDecoding()}
        try:
            if form == "tfrecord":
                records = _records(info.splits[self._split])
                self._rows = _Decoded(
                    records, partial(info.features.deserialize_example_np, decoders=decoders)
                )
            else:
                self._rows = builder.as_data_source(self._split, decoders=decoders)
            rows = len(self._rows)
        except _Damaged as error:
            raise ValueError(f"data.source.path: {error}") from None
        except (ValueError, KeyError, IndexError, AssertionError) as error:
            raise ValueError(
                f"{self._directory} has no split {self._split!r}, it has {', '.join(info.splits) or 'none'}; set "
                f"data.source.{split}_split ({error})"
            ) from None
        self._about = {"name": info.full_name, "split": self._split, "rows": rows}
        self._found(rows)
        if not rows:
            raise ValueError(f"split {self._split!r} of {self._directory} has no rows")

    def _example(self, row: int) -> dict[str, Any]:
        return self._rows[row]

    def _picture(self, row: int) -> bytes | np.ndarray:
        image = self._example(row)[self._config.image_field]
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            raise BadImageError("broken", f"row {row} is {image.dtype}")
        return image if isinstance(image, np.ndarray) else bytes(image)

    def _said(self, row: int) -> Captions:
        if not self._languages:
            return {}
        c, example = self._config, self._example(row)
        if self._captioned:
            fields = {n: _texts(example[n]) for n in (c.captions_field, c.captions_zh_field) if n in example}
            return captions_from_fields(
                fields, {"en": (c.captions_field,), "zh": (c.captions_zh_field,)}, self._languages
            )
        label = int(example[c.label_field])
        return class_captions(self.classes[label], c.templates, self._languages) if label >= 0 else {}

    def _label_of(self, row: int) -> int | None:
        label = int(self._example(row)[self._config.label_field]) if self.classes else -1
        return label if label >= 0 else None  # TFDS writes -1 where there is none

    def _name_of(self, row: int) -> str:
        return f"row {row}"

    def _name(self) -> str:
        return str(self._directory)

    def _identity(self) -> dict[str, Any]:
        return {"kind": "tfds", **self._about}


class _Damaged(Exception):
    """A tfrecord file that cannot be used."""


class _Decoded:
    """Examples out of records."""

    def __init__(self, records: TfRecords, decode: Callable[[bytes], dict[str, Any]]):
        self._records, self._decode = records, decode

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._decode(self._records[row])


def _records(split: Any) -> TfRecords:
    try:
        return TfRecords([(f.filename, f.skip, f.take) for f in split.file_instructions])
    except (ValueError, OSError) as error:
        raise _Damaged(error) from None


def _texts(value: Any) -> list[str]:
    """The texts of a feature: one, several, or a sequence of records with a field `text`."""
    if isinstance(value, dict):
        value = value.get("text", [])
    values = [value] if isinstance(value, (bytes, str)) else list(np.asarray(value, object).reshape(-1))
    texts = []
    for v in values:
        try:
            texts.append(v.decode("utf-8") if isinstance(v, bytes) else str(v))
        except UnicodeDecodeError:
            continue
    return texts


def _directory(source: config.TfdsSource) -> Path:
    """The directory of one version: `path` itself, or the newest that a TFDS name has below data_dir."""
    here = expand_path(source.path)
    root = expand_path(source.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    name, _, version = source.path.partition(":")
    for start in (here, root / name):
        if source.path and (start / "dataset_info.json").is_file():
            return start
        found = (
            [p.parent for p in start.glob("*/dataset_info.json")] if source.path and start.is_dir() else []
        )
        found += (
            [p.parent for p in start.glob("*/*/dataset_info.json")] if not found and start.is_dir() else []
        )
        found = [p for p in found if not version or p.name == version]
        if found:
            return max(found, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")])
    raise FileNotFoundError(
        f"data.source.path: nothing at {source.path!r}, and no prepared TFDS data set of that name in {root}; want a "
        "folder, tar files, an .npz, or a directory with dataset_info.json, as `dalle-jax data SOURCE --convert-to tfds` and "
        "TensorFlow's `tfds build NAME --file_format=array_record` make"
    )
