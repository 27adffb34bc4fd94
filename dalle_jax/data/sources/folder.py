"""Rows of a folder of image files.

Captions come from, in this order: `captions.jsonl`, `metadata.jsonl` or `metadata.csv` in any folder (a record for each
image, its `file_name` relative to that file, as in Hugging Face's imagefolder); `NAME.json` or `NAME.txt` (one caption
per line) beside `NAME.jpg`; or, if every image lies in a subfolder, the name of that subfolder as its class.

The split of an image is the `split` of its record, or its top folder if that is named train, val, validation, test or
eval. If nothing names a split, a hash of the file names holds out `eval_fraction` of the images; images that are added
later move none of the others.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_jax import config
from dalle_jax.data.images import BadImageError, ImageLimits
from dalle_jax.data.sources.captions import (
    captions_from_fields,
    class_captions,
    parse_caption_lines,
    parse_json_object,
)
from dalle_jax.data.sources.dataset import Captions, Split
from dalle_jax.data.sources.stored import StoredDataset

_IMAGE_EXTENSIONS = (".webp", ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_METADATA_FILES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
_FILE_NAME_FIELDS = ("file_name", "file", "image", "path")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "eval": "val", "test": "test"}
_MAX_CAPTION_BYTES = 65_536  # of a caption file

Fields = dict[str, Any]  # of a record


class FolderDataset(StoredDataset):
    """Rows in order of the images' paths. Holds names and captions in memory, no images."""

    def __init__(self, source: config.FolderSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        limits = ImageLimits(source.min_image_size, source.max_aspect_ratio)
        super().__init__(source.max_bad_fraction, languages, limits)
        self._config, self._root = source, Path(os.path.expanduser(source.path))
        if not source.path or not self._root.is_dir():
            raise FileNotFoundError(f"Expected a folder of images in data.source.path, got {source.path!r}.")
        images, metadata = self._find_files()
        records = self._read_metadata(metadata, images) if metadata else self._read_caption_files(images)
        has_classes = (
            not metadata and not any(records.values()) and all("/" in _without_split(n) for n in records)
        )
        if has_classes:
            self.classes = tuple(sorted({_class_name(name) for name in records}))
        wanted = source.train_split if split == "train" else source.eval_split
        splits = {name: _split_of(name, fields) for name, fields in records.items()}
        if not any(splits.values()):
            splits = self._hash_splits(list(records))
        self._split = wanted
        self._names: list[str] = []
        self._captions: list[Captions] = []
        self._labels: list[int] = []
        for name in sorted(records):
            if (splits[name] or source.train_split) not in (wanted, _SPLITS.get(wanted, wanted)):
                continue
            captions = self._captions_of(name, records[name])
            if self._languages and not captions:
                self._reject(name, f"no caption in {' or '.join(self._languages)}")
                continue
            self._names.append(name)
            self._captions.append(captions)
            if has_classes:
                self._labels.append(self.classes.index(_class_name(name)))
        self._set_num_rows(len(self._names))
        if not self._names:
            self._raise_empty(split, splits)

    def _raise_empty(self, split: Split, splits: dict[str, str | None]) -> None:
        if not splits:
            raise ValueError(
                f"Expected files that end in {', '.join(sorted(_IMAGE_EXTENSIONS))} in {self._root} and the "
                "folders below "
                f"it, got none.{self._format_causes()}"
            )
        counts = ", ".join(f"{s} ({n})" for s, n in Counter(splits.values()).items())
        raise ValueError(
            f"Expected rows of split {self._split!r} in {self._root}, got {counts}. Set "
            f"data.source.{split}_split to one "
            f"of these, or set data.source.eval_fraction.{self._format_causes()}"
        )

    def _find_files(self) -> tuple[dict[str, None], list[Path]]:
        """Return the names of the image files, relative to the root, and the metadata files, both in order."""
        images: dict[str, None] = {}
        metadata = []
        for folder, subfolders, files in os.walk(self._root):
            subfolders[:] = sorted(d for d in subfolders if not d.startswith("."))
            for file in sorted(f for f in files if not f.startswith(".")):
                path = Path(folder, file)
                if file in _METADATA_FILES:
                    metadata.append(path)
                elif path.suffix.lower() in _IMAGE_EXTENSIONS:
                    name = path.relative_to(self._root).as_posix()
                    if path.is_file():
                        images[name] = None
                    else:
                        self._reject(name, "missing image file")  # a dangling link, a pipe
        return images, metadata

    def _read_metadata(self, metadata: list[Path], images: dict[str, None]) -> dict[str, Fields]:
        """Return the record of each image that the metadata files list."""
        records: dict[str, Fields] = {}
        for file in metadata:
            for number, fields in _read_records(file):
                line = f"{file.relative_to(self._root)}:{number}"
                if fields is None:
                    self._reject(line, "unreadable metadata line")
                    continue
                name = next((fields[f] for f in _FILE_NAME_FIELDS if isinstance(fields.get(f), str)), None)
                if not name:
                    self._reject(line, "metadata line without a file name")
                    continue
                path = os.path.normpath(file.parent.relative_to(self._root) / name).replace(os.sep, "/")
                if path.startswith("../") or os.path.isabs(name):
                    self._reject(line, "image outside the folder")
                elif path not in images:
                    self._reject(path, "missing image file")
                elif path in records:
                    self._reject(line, "image listed twice")
                else:
                    records[path] = fields
        for name in images:
            if name not in records and self._languages:
                self._reject(name, "no metadata line")
            elif name not in records:
                records[name] = {}
        return records

    def _read_caption_files(self, images: dict[str, None]) -> dict[str, Fields]:
        """Return the record of each image from the file beside it; {} for an image without one."""
        records = {}
        for name in images:
            stem = self._root / os.path.splitext(name)[0]
            file = next((f for f in (Path(f"{stem}.json"), Path(f"{stem}.txt")) if f.is_file()), None)
            fields = {} if file is None else _read_caption_file(file)
            if fields is None:
                self._reject(name, "unreadable caption file")
            else:
                records[name] = fields
        return records

    def _hash_splits(self, names: list[str]) -> dict[str, str | None]:
        """Split names by their hashes; at least one of two images or more is held out."""
        c = self._config
        hashes = {name: _hash_unit(name) for name in names}
        held_out = {name for name in names if hashes[name] < c.eval_fraction}
        if not held_out and c.eval_fraction > 0 and len(names) > 1:
            held_out = {min(names, key=hashes.__getitem__)}
        return {name: c.eval_split if name in held_out else c.train_split for name in names}

    def _captions_of(self, name: str, fields: Fields) -> Captions:
        c = self._config
        if self.classes:
            return class_captions(_class_name(name), c.templates, self._languages)
        names = {"en": (c.captions_field, "caption", "text"), "zh": (c.captions_zh_field,)}
        return captions_from_fields(fields, names, self._languages)

    def _read_image(self, row: int) -> bytes:
        try:
            return (self._root / self._names[row]).read_bytes()
        except OSError as error:
            raise BadImageError("missing image file", f"{self._names[row]}: {error.strerror}") from None

    def _read_captions(self, row: int) -> Captions:
        return self._captions[row]

    def _read_label(self, row: int) -> int | None:
        return self._labels[row] if self.classes else None

    def _row_name(self, row: int) -> str:
        return self._names[row]

    def _source_name(self) -> str:
        return str(self._root)

    def _fingerprint_fields(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([self._names, self._captions]).encode()).hexdigest()[:16]
        return {"kind": "folder", "split": self._split, "rows": len(self), "digest": digest}


def _without_split(name: str) -> str:
    """Return the name without a top folder that names a split."""
    top, _, rest = name.partition("/")
    return rest if rest and top.lower() in _SPLITS else name


def _class_name(name: str) -> str:
    return _without_split(name).split("/")[0]


def _split_of(name: str, fields: Fields) -> str | None:
    """Return the split that the record or the top folder names, or None."""
    split = fields.get("split")
    if isinstance(split, str) and split:
        return split
    top, slash, _ = name.partition("/")
    return _SPLITS.get(top.lower()) if slash else None


def _hash_unit(name: str) -> float:
    """Hash the name without its extension to [0, 1)."""
    stem = os.path.splitext(name)[0].encode("utf-8", "surrogateescape")
    return int(hashlib.sha256(stem).hexdigest()[:8], 16) / 2**32


def _read_records(file: Path) -> list[tuple[int, Fields | None]]:
    """Read the line number and fields of each record of a metadata file; None for an unreadable record."""
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if file.suffix == ".jsonl":
        return [(i, parse_json_object(line)) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    records: list[tuple[int, Fields | None]] = []
    lines = [
        line.decode("utf-8", "surrogateescape") for line in data.replace(b"\0", b"\xff").splitlines(True)
    ]
    try:
        for number, fields in enumerate(csv.DictReader(lines), 2):
            bad = None in fields or any(_is_undecoded(v) for v in fields.values() if isinstance(v, str))
            records.append((number, None if bad else fields))
    except csv.Error:
        records.append((len(records) + 2, None))
    return records


def _is_undecoded(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


def _read_caption_file(file: Path) -> Fields | None:
    """Read the fields of `NAME.json` or the captions of `NAME.txt`; None if the file cannot be read."""
    try:
        if file.stat().st_size > _MAX_CAPTION_BYTES:
            return None
        data = file.read_bytes()
    except OSError:
        return None
    return parse_json_object(data) if file.suffix == ".json" else parse_caption_lines(data)
