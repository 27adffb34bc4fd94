"""Rows of a prepared TensorFlow Datasets directory in array_record or tfrecord format, read without TensorFlow.

A data set has captions (a field of texts, such as `captions/text` of coco_captions), or labels (`label`; templates make
captions of the class names), or neither, for models without captions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dalle_jax import config
from dalle_jax.data.images import BadImageError, ImageLimits
from dalle_jax.data.sources.captions import captions_from_fields, class_captions
from dalle_jax.data.sources.dataset import Captions, Split
from dalle_jax.data.sources.stored import StoredDataset
from dalle_jax.data.sources.tfrecord import TfRecords


class _Examples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, Any]: ...


class TfdsDataset(StoredDataset):
    """The rows of one split, in the order of the data set."""

    def __init__(self, source: config.TfdsSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        limits = ImageLimits(source.min_image_size, source.max_aspect_ratio)
        super().__init__(source.max_bad_fraction, languages, limits)
        self._config, self._directory = source, _find_directory(source)
        import tensorflow_datasets as tfds

        self._split = source.train_split if split == "train" else source.eval_split
        builder = tfds.builder_from_directory(str(self._directory))
        info = builder.info
        file_format = info.file_format and info.file_format.value
        if file_format not in ("array_record", "tfrecord"):
            raise ValueError(
                f"Expected array_record or tfrecord format in data.source.path {self._directory}, got {file_format}. "
                "Prepare it again with --file_format=array_record."
            )
        if source.image_field not in info.features:
            raise ValueError(
                f"{self._directory} has no field {source.image_field!r}. Set data.source.image_field to one of "
                f"{', '.join(info.features)}."
            )
        self._has_captions = (
            source.captions_field in info.features or source.captions_zh_field in info.features
        )
        if source.label_field in info.features:
            feature = info.features[source.label_field]
            if isinstance(feature, tfds.features.ClassLabel) and feature.names:
                self.classes = tuple(feature.names)
        if self._languages and not self._has_captions and not self.classes:
            raise ValueError(
                f"Expected captions ({source.captions_field!r}) or class labels ({source.label_field!r}) in "
                f"{self._directory}, got neither. Set data.source.captions_field to one of {', '.join(info.features)}."
            )
        decoders: Any = {source.image_field: tfds.decode.SkipDecoding()}
        try:
            if file_format == "tfrecord":
                decode = partial(info.features.deserialize_example_np, decoders=decoders)
                self._examples: _Examples = _DecodedRecords(_open_records(info.splits[self._split]), decode)
            else:
                self._examples = _open_array_record(builder, self._split, decoders)
            rows = len(self._examples)
        except _DamagedFileError as error:
            raise ValueError(f"data.source.path: {error}") from None
        except (ValueError, KeyError, IndexError, AssertionError) as error:
            raise ValueError(
                f"{self._directory} has no split {self._split!r}, it has {', '.join(info.splits) or 'none'}. Set "
                f"data.source.{split}_split ({error})."
            ) from None
        self._fields = {"kind": "tfds", "name": info.full_name, "split": self._split, "rows": rows}
        self._set_num_rows(rows)
        if not rows:
            raise ValueError(f"split {self._split!r} of {self._directory} has no rows.")

    def _read_image(self, row: int) -> bytes | np.ndarray:
        image = self._examples[row][self._config.image_field]
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            raise BadImageError("corrupt image", f"row {row} is {image.dtype}")
        return image if isinstance(image, np.ndarray) else bytes(image)

    def _read_captions(self, row: int) -> Captions:
        if not self._languages:
            return {}
        c, example = self._config, self._examples[row]
        if self._has_captions:
            fields = {n: _texts(example[n]) for n in (c.captions_field, c.captions_zh_field) if n in example}
            names = {"en": (c.captions_field,), "zh": (c.captions_zh_field,)}
            return captions_from_fields(fields, names, self._languages)
        label = int(example[c.label_field])
        return class_captions(self.classes[label], c.templates, self._languages) if label >= 0 else {}

    def _read_label(self, row: int) -> int | None:
        label = int(self._examples[row][self._config.label_field]) if self.classes else -1
        return label if label >= 0 else None  # TFDS writes -1 for no label

    def _row_name(self, row: int) -> str:
        return f"row {row}"

    def _source_name(self) -> str:
        return str(self._directory)

    def _fingerprint_fields(self) -> dict[str, Any]:
        return dict(self._fields)


class _DamagedFileError(Exception):
    """A tfrecord file cannot be used."""


class _DecodedRecords:
    """Examples decoded from tfrecords."""

    def __init__(self, records: TfRecords, decode: Callable[[bytes], dict[str, Any]]):
        self._records, self._decode = records, decode

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        return self._decode(self._records[row])


def _open_records(split: Any) -> TfRecords:
    try:
        return TfRecords([(f.filename, f.skip, f.take) for f in split.file_instructions])
    except (ValueError, OSError) as error:
        raise _DamagedFileError(error) from None


def _open_array_record(builder: Any, split: str, decoders: Any) -> _Examples:
    return builder.as_data_source(split, decoders=decoders)


def _texts(value: Any) -> list[str]:
    """Return the texts of a feature: one, several, or a sequence of records with a field `text`."""
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


def _find_directory(source: config.TfdsSource) -> Path:
    """Return the directory of one version: `path`, or the newest version of a TFDS name below data_dir."""
    path = Path(os.path.expanduser(source.path))
    data_dir = source.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(os.path.expanduser(data_dir))
    name, _, version = source.path.partition(":")
    for start in (path, root / name):
        if source.path and (start / "dataset_info.json").is_file():
            return start
        for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
            directories = [p.parent for p in start.glob(pattern)] if source.path and start.is_dir() else []
            if directories:
                break
        directories = [p for p in directories if not version or p.name == version]
        if directories:
            return max(directories, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")])
    raise FileNotFoundError(
        "Expected a folder of images, tar files, an .npz file, or the directory or name of a TFDS data set, got "
        f"{source.path!r}, which is neither an existing path nor a data set prepared in {root}. Use an existing path, "
        "or prepare the data set with `dalle-jax data SOURCE --convert-to tfds` or TensorFlow's `tfds build NAME "
        "--file_format=array_record`."
    )
