"""Rows of a folder of picture files, as people keep them.

Captions are found in this order: `captions.jsonl`, `metadata.jsonl` or `metadata.csv` in any folder (a row for
each picture, its `file_name` relative to that file: the imagefolder form of Hugging Face datasets); else
`NAME.json` or `NAME.txt` (a caption a line) beside `NAME.jpg`; else, where every picture lies in a subfolder,
the name of that subfolder is its class.

The split of a picture is what its record says, else the top folder if that is named train, val, validation,
test or eval. Where nothing names a split, `eval_fraction` of the pictures is held out by a hash of their names:
pictures that are added later move none of the others.
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
from dalle_jax.data.sources.dataset import (
    IMAGE_EXTENSIONS,
    Captions,
    Split,
    StoredDataset,
    captions_from_fields,
    class_captions,
    expand_path,
    parse_json_object,
)

_METADATA = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
_FILE_FIELDS = ("file_name", "file", "image", "path")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "eval": "val", "test": "test"}
_LARGEST_FILE = 65_536  # bytes of a caption file


class FolderDataset(StoredDataset):
    """Rows in order of the pictures' paths. Holds names and captions in memory, no pictures."""

    def __init__(self, source: config.FolderSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        super().__init__(
            source.max_bad_fraction, languages, ImageLimits(source.min_image_size, source.max_aspect_ratio)
        )
        self._config, self._root = source, expand_path(source.path)
        if not source.path or not self._root.is_dir():
            raise FileNotFoundError(f"data.source.path: no folder {source.path!r}; want a folder of pictures")
        pictures, metadata = self._walk()
        records = self._listed_in(metadata, pictures) if metadata else self._beside(pictures)
        in_classes = (
            not metadata and not any(records.values()) and all("/" in _tail(name) for name in records)
        )
        if in_classes:
            self.classes = tuple(sorted({_tail(name).split("/")[0] for name in records}))
        wanted = source.train_split if split == "train" else source.eval_split
        splits = {name: _split(name, fields) for name, fields in records.items()}
        if not any(splits.values()):
            splits = self._held_out(list(records))
        self._names: list[str] = []
        self._fields: list[Captions] = []
        self._labels: list[int] = []
        for name in sorted(records):
            said = splits[name] or source.train_split
            if said not in (wanted, _SPLITS.get(wanted, wanted)):
                continue
            captions = self._captions(name, records[name])
            if self._languages and not captions:
                self._reject(name, f"no caption in {' or '.join(self._languages)}")
                continue
            self._names.append(name)
            self._fields.append(captions)
            if in_classes:
                self._labels.append(self.classes.index(_tail(name).split("/")[0]))
        self._split = wanted
        self._found(len(self._names))
        if not self._names and not splits:
            raise ValueError(
                f"no pictures in {self._root} and the folders below it; want files that end in "
                f"{', '.join(sorted(IMAGE_EXTENSIONS))}{self._table()}"
            )
        if not self._names:
            found = ", ".join(f"{s} ({n})" for s, n in Counter(splits.values()).items())
            raise ValueError(
                f"no rows of split {wanted!r} in {self._root}; its pictures have: {found}; set "
                f"data.source.{split}_split to one of these, or data.source.eval_fraction{self._table()}"
            )

    def _walk(self) -> tuple[dict[str, None], list[Path]]:
        """Names of the picture files, relative to the root, and the files of metadata, both in order."""
        pictures: dict[str, None] = {}
        metadata = []
        for folder, inside, files in os.walk(self._root):
            inside[:] = sorted(d for d in inside if not d.startswith("."))
            for file in sorted(f for f in files if not f.startswith(".")):
                path = Path(folder, file)
                if file in _METADATA:
                    metadata.append(path)
                elif path.suffix.lower() in IMAGE_EXTENSIONS:
                    name = path.relative_to(self._root).as_posix()
                    if path.is_file():
                        pictures[name] = None
                    else:
                        self._reject(name, "picture missing")  # a link to nothing, a folder, a pipe
        return pictures, metadata

    def _listed_in(self, metadata: list[Path], pictures: dict[str, None]) -> dict[str, dict]:
        records: dict[str, dict] = {}
        for file in metadata:
            for number, fields in _rows_of(file):
                at = f"{file.relative_to(self._root)}:{number}"
                if fields is None:
                    self._reject(at, "broken line of metadata")
                    continue
                name = next((fields[f] for f in _FILE_FIELDS if isinstance(fields.get(f), str)), None)
                if not name:
                    self._reject(at, "line without a file name")
                    continue
                path = os.path.normpath(file.parent.relative_to(self._root) / name).replace(os.sep, "/")
                if path.startswith("../") or os.path.isabs(name):
                    self._reject(at, "picture outside the folder")
                elif path not in pictures:
                    self._reject(path, "picture missing")
                elif path in records:
                    self._reject(at, "picture listed twice")
                else:
                    records[path] = fields
        for name in pictures:
            if name not in records and self._languages:
                self._reject(name, "no line of metadata")
            elif name not in records:
                records[name] = {}
        return records

    def _beside(self, pictures: dict[str, None]) -> dict[str, dict]:
        records = {}
        for name in pictures:
            stem = self._root / os.path.splitext(name)[0]
            fields: dict | None = {}
            for file in (Path(f"{stem}.json"), Path(f"{stem}.txt")):
                if file.is_file():
                    fields = _read_beside(file)
                    break
            if fields is None:
                self._reject(name, "caption file broken")
            else:
                records[name] = fields
        return records

    def _held_out(self, names: list[str]) -> dict[str, str]:
        """A split for each name by its hash; at least one picture is held out where there are two."""
        c = self._config
        share = {name: _share(name) for name in names}
        held = {name for name in names if share[name] < c.eval_fraction}
        if not held and c.eval_fraction > 0 and len(names) > 1:
            held = {min(names, key=share.__getitem__)}
        return {name: c.eval_split if name in held else c.train_split for name in names}

    def _captions(self, name: str, fields: dict) -> Captions:
        if self.classes:
            return class_captions(_tail(name).split("/")[0], self._config.templates, self._languages)
        c = self._config
        names = {"en": (c.captions_field, "caption", "text"), "zh": (c.captions_zh_field,)}
        return captions_from_fields(fields, names, self._languages)

    def _picture(self, row: int) -> bytes:
        try:
            return (self._root / self._names[row]).read_bytes()
        except OSError as error:
            raise BadImageError("missing", f"{self._names[row]}: {error.strerror}") from None

    def _said(self, row: int) -> Captions:
        return self._fields[row]

    def _label_of(self, row: int) -> int | None:
        return self._labels[row] if self.classes else None

    def _name_of(self, row: int) -> str:
        return self._names[row]

    def _name(self) -> str:
        return str(self._root)

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([self._names, self._fields]).encode()).hexdigest()[:16]
        return {"kind": "folder", "split": self._split, "rows": len(self), "digest": digest}


def _tail(name: str) -> str:
    """The name without a top folder that names a split."""
    top, _, rest = name.partition("/")
    return rest if rest and top.lower() in _SPLITS else name


def _split(name: str, fields: dict) -> str | None:
    said = fields.get("split")
    if isinstance(said, str) and said:
        return said
    top, slash, _ = name.partition("/")
    return _SPLITS.get(top.lower()) if slash else None


def _share(name: str) -> float:
    """A number in [0, 1) that follows from the name without its ending."""
    stem = os.path.splitext(name)[0].encode("utf-8", "surrogateescape")
    return int(hashlib.sha256(stem).hexdigest()[:8], 16) / 2**32


def _rows_of(file: Path) -> list[tuple[int, dict | None]]:
    """Line number and fields of each row of a metadata file; None for a row that cannot be read."""
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if file.suffix == ".jsonl":
        return [(i, parse_json_object(line)) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    rows: list[tuple[int, dict | None]] = []
    lines = [
        line.decode("utf-8", "surrogateescape") for line in data.replace(b"\0", b"\xff").splitlines(True)
    ]
    try:
        for number, fields in enumerate(csv.DictReader(lines), 2):
            broken = None in fields or any(_undecoded(v) for v in fields.values() if isinstance(v, str))
            rows.append((number, None if broken else fields))
    except csv.Error:
        rows.append((len(rows) + 2, None))
    return rows


def _undecoded(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


def _read_beside(file: Path) -> dict | None:
    """The fields of a `NAME.json`; the lines of a `NAME.txt` as captions. None if it cannot be read."""
    try:
        if file.stat().st_size > _LARGEST_FILE:
            return None
        data = file.read_bytes()
        if file.suffix == ".json":
            return parse_json_object(data)
        return {"captions": data.decode("utf-8-sig").splitlines()}
    except (OSError, UnicodeDecodeError):
        return None
