"""Rows of tar files of images, each image beside its JSON or its captions as text (WebDataset's layout)."""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax import config
from dalle_jax.data.images import ImageLimits
from dalle_jax.data.sources.captions import captions_from_fields, parse_caption_lines, parse_json_object
from dalle_jax.data.sources.dataset import Captions, Split
from dalle_jax.data.sources.stored import StoredDataset

_IMAGE_EXTENSIONS = (".webp", ".png", ".jpg", ".jpeg")  # of several images of one record the first is taken
_MAX_JSON_BYTES = 1_000_000
_IMAGE, _JSON, _TEXT = 1, 3, 5  # columns of the row table: offset, then bytes


class _Member(NamedTuple):
    """A file in a tar."""

    offset: int
    size: int  # bytes


class _Record(NamedTuple):
    """The files of one record."""

    image: _Member | None
    json: _Member | None
    text: _Member | None


class TarDataset(StoredDataset):
    """Rows of one or several tars, indexed once. Holds one open file per tar and reads by offset."""

    def __init__(self, source: config.TarSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        limits = ImageLimits(source.min_image_size, source.max_aspect_ratio)
        super().__init__(source.max_bad_fraction, languages, limits)
        self._config = source
        self._split = source.train_split if split == "train" else source.eval_split
        self._paths = _find_tars(source.path)
        self._open()
        rows, digest, splits = [], hashlib.sha256(), Counter()
        for number, path in enumerate(self._paths):
            for name, record in _index_tar(path).items():
                record_split, cause = self._check(number, record)
                splits[record_split] += 1
                if record_split not in (self._split, None):
                    continue
                if cause is not None or record.image is None:
                    self._reject(f"{path}: {name}", cause or "no image")
                    continue
                rows.append((number, *record.image, *(record.json or (0, 0)), *(record.text or (0, 0))))
                sizes = f"{record.image.size} {record.json and record.json.size}"
                sizes += f" {record.text.size}" if record.text else ""
                digest.update(f"{name} {sizes}\n".encode("utf-8", "surrogateescape"))
        self._rows = np.array(rows, np.int64).reshape(-1, 7)  # tar, then the columns
        self._digest = digest.hexdigest()[:16]
        self._set_num_rows(len(rows))
        if not rows:
            counts = ", ".join(f"{name!r} ({n})" for name, n in sorted(splits.items(), key=str))
            raise ValueError(
                f"Expected rows of split {self._split!r} in {self._source_name()}, got {counts or 'no records'}. Set "
                f"data.source.{split}_split to one of these.{self._format_causes()}"
            )

    def _open(self) -> None:
        self._files: list[int] = []
        self._finalizer = weakref.finalize(self, _close_files, self._files)
        for path in self._paths:
            self._files.append(os.open(path, os.O_RDONLY))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_files": [], "_finalizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open()

    def close(self) -> None:
        """Close the files; garbage collection does it too."""
        self._finalizer()

    def _check(self, tar: int, record: _Record) -> tuple[str | None, str | None]:
        """Return the split of a record (None if it has no usable one) and why it cannot be used (None if it can)."""
        fields: dict[str, Any] | None = {}
        if record.json is not None:
            fits = record.json.size <= _MAX_JSON_BYTES
            fields = parse_json_object(self._read_member(tar, record.json) if fits else b"")
            if fields is None:
                return None, "invalid JSON"
        split = fields.get("split", self._config.train_split)
        split = split if isinstance(split, str) else None
        if record.image is None:
            return split, "no image"
        if record.image.size == 0:
            return split, "empty image file"
        if self._languages and record.json is None and record.text is None:
            return split, "no caption file"
        if self._languages and not self._captions_of(fields):
            lines: dict[str, Any] | None = {}
            if record.text is not None:
                bounded = record.text._replace(size=min(record.text.size, _MAX_JSON_BYTES))
                lines = parse_caption_lines(self._read_member(tar, bounded))
                if lines is None:
                    return split, "unreadable caption file"
            if not self._captions_of(lines):
                return split, f"no caption in {' or '.join(self._languages)}"
        return split, "split is not a string" if split is None else None

    def _read_member(self, tar: int, member: _Member) -> bytes:
        return os.pread(self._files[tar], member.size, member.offset)

    def _read(self, row: int, column: int) -> bytes:
        offset, size = (int(x) for x in self._rows[row, column : column + 2])
        return self._read_member(self._rows[row, 0], _Member(offset, size))

    def _captions_of(self, fields: dict[str, Any]) -> Captions:
        names = {"en": (self._config.captions_field, "caption"), "zh": (self._config.captions_zh_field,)}
        return captions_from_fields(fields, names, self._languages)

    def _read_image(self, row: int) -> bytes:
        return self._read(row, _IMAGE)

    def _read_captions(self, row: int) -> Captions:
        if data := self._read(row, _JSON):
            captions = self._captions_of(parse_json_object(data) or {})
            if captions:
                return captions
        return self._captions_of(parse_caption_lines(self._read(row, _TEXT)) or {})

    def _row_name(self, row: int) -> str:
        return f"{self._paths[self._rows[row, 0]]} at byte {self._rows[row, 1]}"

    def _source_name(self) -> str:
        more = f" and {len(self._paths) - 1} more tars" if len(self._paths) > 1 else ""
        return f"{self._paths[0]}{more}"

    def _fingerprint_fields(self) -> dict[str, Any]:
        return {"kind": "tar", "split": self._split, "rows": len(self), "digest": self._digest}


def _close_files(files: list[int]) -> None:
    while files:
        os.close(files.pop())


def _find_tars(pattern: str) -> list[Path]:
    """Find the tars of data.source.path, in its order; the matches of a glob in order of name."""
    paths: list[Path] = []
    for part in (p.strip() for p in pattern.split(",")):
        if not part:
            continue
        part = os.path.expanduser(part)
        names = sorted(glob.glob(part)) if glob.has_magic(part) and not os.path.exists(part) else [part]
        if not names:
            raise FileNotFoundError(f"data.source.path: no file matches {part!r} (in {Path.cwd()}).")
        for name in names:
            if not os.path.isfile(name):
                what = "is a folder" if os.path.isdir(name) else "does not exist"
                raise FileNotFoundError(
                    f"Expected a tar file in data.source.path: {name!r} {what} (in {Path.cwd()})."
                )
        paths += [Path(name) for name in names if Path(name) not in paths]
    if not paths:
        raise ValueError("data.source.path is empty. Set it to a tar file, several with commas, or a glob.")
    return paths


def _index_tar(path: Path) -> dict[str, _Record]:
    """Return the records of a tar by name, in its order.

    A member written twice counts as its last copy, as when unpacking. Links, folders and hidden files are ignored.
    """
    images: dict[str, dict[str, _Member]] = {}
    jsons: dict[str, _Member] = {}
    texts: dict[str, _Member] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # ty: ignore[missing-attribute] tarfile would keep every header in memory
                name, kind = os.path.splitext(info.name)
                if not info.isreg() or info.issparse() or os.path.basename(name).startswith("."):
                    continue
                member, kind = _Member(info.offset_data, info.size), kind.lower()
                if kind == ".json":
                    jsons[name] = member
                    images.setdefault(name, {})
                elif kind == ".txt":
                    texts[name] = member
                elif kind in _IMAGE_EXTENSIONS:
                    images.setdefault(name, {})[kind] = member
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        what = "is cut short" if "end of data" in str(error) else "is not a tar file"
        raise ValueError(
            f"Expected an uncompressed tar in data.source.path: {path} {what} ({error}). Copy it again, or unpack a "
            "compressed one."
        ) from None
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(512)
    if mark != bytes(512):  # tarfile takes a damaged header for the end
        what = "is damaged" if len(mark) == 512 else "is cut short"
        raise ValueError(
            f"Expected a record or the end mark of a tar in data.source.path: {path} {what} at byte {end}. "
            "Copy or pack "
            "it again."
        )
    return {
        name: _Record(
            next((kinds[k] for k in _IMAGE_EXTENSIONS if k in kinds), None), jsons.get(name), texts.get(name)
        )
        for name, kinds in images.items()
    }
