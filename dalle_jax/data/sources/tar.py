"""Rows of one or several tars of pictures, each beside its JSON or its captions as text (WebDataset's form); indexed
once, then read by position."""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax import config
from dalle_jax.data.images import ImageLimits
from dalle_jax.data.sources.dataset import (
    Captions,
    Split,
    StoredDataset,
    captions_from_fields,
    parse_json_object,
)

_PICTURES = (".webp", ".png", ".jpg", ".jpeg")
_LARGEST_JSON = 1_000_000  # bytes


class TarDataset(StoredDataset):
    """Rows of one or several tars, indexed once; holds one open file per tar and reads by position."""

    def __init__(self, source: config.TarSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        super().__init__(
            source.max_bad_fraction, languages, ImageLimits(source.min_image_size, source.max_aspect_ratio)
        )
        self._config = source
        self._split = source.train_split if split == "train" else source.eval_split
        self._paths = _find(source.path)
        self._open()
        rows, digest, splits = [], hashlib.sha256(), Counter()
        for number, path in enumerate(self._paths):
            for name, (picture, notes, text) in _index(path).items():
                here, cause = self._judge(number, picture, notes, text)
                splits[here] += 1
                if here not in (self._split, None):
                    continue
                if cause is not None:
                    self._reject(f"{path}: {name}", cause)
                    continue
                rows.append((number, *picture, *(notes or (0, 0)), *(text or (0, 0))))
                sizes = f"{picture[1]} {notes and notes[1]}" + (f" {text[1]}" if text else "")
                digest.update(f"{name} {sizes}\n".encode("utf-8", "surrogateescape"))
        self._rows = np.array(rows, np.int64).reshape(
            -1, 7
        )  # tar, then place and bytes of picture, JSON, text
        self._digest = digest.hexdigest()[:16]
        self._found(len(rows))
        if not rows:
            found = (
                ", ".join(f"{name!r} ({n})" for name, n in sorted(splits.items(), key=str)) or "no records"
            )
            raise ValueError(
                f"no rows of split {self._split!r} in {self._name()}; its records have {found}; set "
                f"data.source.{split}_split to one of these{self._table()}"
            )

    def _open(self) -> None:
        self._files: list[int] = []
        self._finalizer = weakref.finalize(self, _close, self._files)
        for path in self._paths:
            self._files.append(os.open(path, os.O_RDONLY))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_files": [], "_finalizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open()

    def _picture(self, row: int) -> bytes:
        return self._read(row, 1)

    def _said(self, row: int) -> Captions:
        if data := self._read(row, 3):
            said = _captions(parse_json_object(data) or {}, self._config, self._languages)
            if said:
                return said
        return _captions(_lines(self._read(row, 5)) or {}, self._config, self._languages)

    def _name_of(self, row: int) -> str:
        return f"{self._paths[self._rows[row, 0]]} at byte {self._rows[row, 1]}"

    def _identity(self) -> dict[str, Any]:
        fields = {"rows": len(self), "digest": self._digest}
        return {"kind": "tar", "split": self._split, **fields}

    def close(self) -> None:
        """Closes the files; garbage collection does it too."""
        self._finalizer()

    def _read(self, row: int, column: int) -> bytes:
        at, size = (int(x) for x in self._rows[row, column : column + 2])
        return os.pread(self._files[self._rows[row, 0]], size, at)

    def _judge(
        self, number: int, picture: tuple | None, notes: tuple | None, text: tuple | None
    ) -> tuple[str | None, str | None]:
        """The split of a record (None if it does not say) and why it cannot be used (None if it can)."""
        fields: dict | None = {}
        if notes is not None:
            data = os.pread(self._files[number], notes[1], notes[0]) if notes[1] <= _LARGEST_JSON else b""
            fields = parse_json_object(data)
            if fields is None:
                return None, "broken JSON"
        split = fields.get("split", self._config.train_split)
        split = split if isinstance(split, str) else None
        if picture is None:
            return split, "no picture"
        if picture[1] == 0:
            return split, "picture empty"
        if self._languages and notes is None and text is None:
            return split, "no JSON"
        if self._languages and not _captions(fields, self._config, self._languages):
            lines: dict | None = {}
            if text is not None:
                lines = _lines(os.pread(self._files[number], min(text[1], _LARGEST_JSON), text[0]))
                if lines is None:
                    return split, "caption file broken"
            if not _captions(lines, self._config, self._languages):
                return split, f"no caption in {' or '.join(self._languages)}"
        return split, "split is not a text" if split is None else None

    def _name(self) -> str:
        more = f" and {len(self._paths) - 1} more tars" if len(self._paths) > 1 else ""
        return f"{self._paths[0]}{more}"


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


def _find(pattern: str) -> list[Path]:
    """The tars that the config's path names, in its order; the matches of a glob in order of name."""
    paths: list[Path] = []
    for part in (p.strip() for p in pattern.split(",")):
        if not part:
            continue
        part = os.path.expanduser(part)
        found = sorted(glob.glob(part)) if glob.has_magic(part) and not os.path.exists(part) else [part]
        if not found:
            raise FileNotFoundError(f"data.source.path: no file matches {part!r} (in {Path.cwd()})")
        for name in found:
            if not os.path.isfile(name):
                what = "is a folder" if os.path.isdir(name) else "does not exist"
                raise FileNotFoundError(
                    f"data.source.path: {name!r} {what}; want a tar file (in {Path.cwd()})"
                )
        paths += [Path(name) for name in found if Path(name) not in paths]
    if not paths:
        raise ValueError("data.source.path is empty; name a tar file, several with commas, or a glob")
    return paths


def _index(path: Path) -> dict[str, tuple[tuple[int, int] | None, ...]]:
    """Record name -> where its picture, its JSON and its text are (position, bytes), in order of the tar.

    A member written twice counts as its last copy, as when unpacking; of two pictures of one record the first
    kind in webp, png, jpg, jpeg is taken. Links, folders and hidden files are no records.
    """
    pictures: dict[str, dict[str, tuple[int, int]]] = {}
    notes: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header
                name, kind = os.path.splitext(member.name)
                if not member.isreg() or member.issparse() or os.path.basename(name).startswith("."):
                    continue
                place, kind = (member.offset_data, member.size), kind.lower()
                if kind == ".json":
                    notes[name] = place
                    pictures.setdefault(name, {})
                elif kind == ".txt":
                    texts[name] = place
                elif kind in _PICTURES:
                    pictures.setdefault(name, {})[kind] = place
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        what = "is cut short" if "end of data" in str(error) else "is not a tar file"
        raise ValueError(
            f"data.source.path: {path} {what} ({error}); want an uncompressed tar: copy it again, or unpack "
            "a compressed one"
        ) from None
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(512)
    if mark != bytes(512):  # tarfile takes a damaged header for the end
        what = "is damaged" if len(mark) == 512 else "is cut short"
        raise ValueError(
            f"data.source.path: {path} {what} at byte {end}: want another record or the mark that ends a "
            "tar; copy or pack it again"
        )
    return {
        name: (next((kinds[k] for k in _PICTURES if k in kinds), None), notes.get(name), texts.get(name))
        for name, kinds in pictures.items()
    }


def _lines(data: bytes) -> dict | None:
    """The captions of a text, a line each; None for one that is not UTF-8."""
    try:
        return {"caption": data.decode("utf-8-sig").splitlines()}
    except UnicodeDecodeError:
        return None


def _captions(fields: dict, names: config.TarSource, languages: Sequence[str]) -> Captions:
    fields_of = {"en": (names.captions_field, "caption"), "zh": (names.captions_zh_field,)}
    return captions_from_fields(fields, fields_of, languages)
