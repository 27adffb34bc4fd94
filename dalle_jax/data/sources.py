"""Where rows come from: a picture and its captions by index, from drawn scenes or from tar files.

A source is random access and safe to read from many threads; the pipeline above decides the order. A row
index means the same row for as long as the files stay as they are, also when some of their pictures turn out
broken: those are replaced, picture and captions, by the next row whose picture decodes, and counted.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tarfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from dalle_jax import config
from dalle_jax.data import scenes
from dalle_jax.data.images import BadImage, Crop, decode

Split = Literal["train", "eval"]
Captions = dict[str, tuple[str, ...]]  # language -> its captions, at least one each

EVAL_SCENES = 100_000  # rows of the scenes' evaluation split
SCENE_CAPTIONS = 2  # captions of each scene in each language
_PICTURES = (".webp", ".png", ".jpg", ".jpeg")
_LARGEST_JSON = 1_000_000  # bytes


class Source(Protocol):
    """Rows by index, 0 to len - 1."""

    def __len__(self) -> int: ...

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        """Picture of row i, uint8 (size, size, 3). `rng` draws the random crop."""
        ...

    def captions(self, i: int) -> Captions:
        """Captions of row i. Of a row whose picture was replaced, those of the replacement: read it first."""
        ...

    @property
    def stand_ins(self) -> dict[int, int]:
        """Rows whose picture did not decode, of those read so far, and the row that each one shows
        instead."""
        ...

    def report(self) -> dict[str, int]:
        """Records that cannot be used, cause -> count, found so far."""
        ...

    def identity(self) -> str:
        """JSON that is equal for two sources if their rows are."""
        ...


def open_source(
    source: config.SourceConfig, split: Split, *, languages: Sequence[str] = ("en", "zh")
) -> Source:
    """The rows of one split.

    languages: of the captions wanted. A row that has some of them is used with what it has, a row with none
        is unusable. None asked: every row with a picture is used, whether it has captions or not.

    Raises FileNotFoundError or ValueError, saying what was wanted and what to do, for paths that are not
    there, files that are not whole tars, splits without rows, and more unusable records than
    `max_bad_share`.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}; want 'train' or 'eval'")
    match source:
        case config.ScenesSource():
            return SceneRows(source, split, languages=languages)
        case config.TarSource():
            return TarRows(source, split, languages=languages)
    raise ValueError(f"no source for a {type(source).__name__}; want one of config.SourceConfig")


def sample_captions(source: Source, count: int) -> Iterator[str]:
    """About `count` captions from rows spread evenly over the source, every language of a row; for a
    vocabulary."""
    first = sum(len(texts) for texts in source.captions(0).values())
    rows = min(len(source), -(-count // max(1, first)))
    left = count
    for row in range(rows):
        for texts in source.captions(row * len(source) // rows).values():
            yield from texts[:left]
            left -= len(texts[:left])


class FirstRows:
    """The first `count` rows of another source: what codes encoded ahead hold when the file is not
    complete."""

    def __init__(self, source: Source, count: int):
        if not 1 <= count <= len(source):
            raise ValueError(f"the first {count} rows of a source of {len(source)}; want 1 to {len(source)}")
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        return self._source.image(i, size, crop, rng)

    def captions(self, i: int) -> Captions:
        return self._source.captions(i)

    @property
    def stand_ins(self) -> dict[int, int]:
        return self._source.stand_ins

    def report(self) -> dict[str, int]:
        return self._source.report()

    def identity(self) -> str:
        return self._source.identity()


class SceneRows:
    """Procedural scenes: row i is scene i of the stream "train" or "val". Nothing is stored."""

    def __init__(self, source: config.ScenesSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        self._config, self._languages = source, tuple(languages)
        self._stream = "train" if split == "train" else "val"
        self._count = source.count if split == "train" else EVAL_SCENES

    def __len__(self) -> int:
        return self._count

    def scene(self, i: int) -> scenes.Scene:
        """The scene that row i shows."""
        c = self._config
        return scenes.scene(
            i,
            split=self._stream,
            seed=c.seed,
            min_objects=c.min_objects,
            max_objects=c.max_objects,
            sizes=c.sizes,
            fills=c.fills,
            backgrounds=c.backgrounds,
        )

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        return scenes.render(self.scene(i), size)  # square already: no crop

    def captions(self, i: int) -> Captions:
        if not self._languages:
            return {}
        said = scenes.captions(
            self.scene(i), index=i, seed=self._config.seed, languages=self._languages, count=SCENE_CAPTIONS
        )
        return {name: tuple(c.text for c in said if c.language == name) for name in self._languages}

    @property
    def stand_ins(self) -> dict[int, int]:
        return {}

    def report(self) -> dict[str, int]:
        return {}

    def identity(self) -> str:
        c = self._config
        fields = {"seed": c.seed, "min_objects": c.min_objects, "max_objects": c.max_objects}
        fields |= {"sizes": list(c.sizes), "fills": list(c.fills), "backgrounds": list(c.backgrounds)}
        return json.dumps({"kind": "scenes", "split": self._stream, **fields})


class TarRows:
    """Rows of one or several tars, indexed once; holds one open file per tar and reads by position."""

    def __init__(self, source: config.TarSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        self._config, self._languages = source, tuple(languages)
        self._split = source.train_split if split == "train" else source.eval_split
        self._causes: Counter[str] = Counter()
        self._broken: dict[int, str] = {}  # row -> why its picture cannot be used
        self._stand_ins: dict[int, int] = {}
        self._lock = threading.Lock()
        self._paths = _find(source.path)
        self._files: list[int] = []
        self._finalizer = weakref.finalize(self, _close, self._files)
        rows, digest, splits = [], hashlib.sha256(), Counter()
        for number, path in enumerate(self._paths):
            self._files.append(os.open(path, os.O_RDONLY))
            for name, (picture, notes) in _index(path).items():
                here, cause = self._judge(number, picture, notes)
                splits[here] += 1
                if here not in (self._split, None):
                    continue
                if cause is not None:
                    self._causes[cause] += 1
                    continue
                rows.append((number, *picture, *(notes or (0, 0))))
                digest.update(
                    f"{name} {picture[1]} {notes and notes[1]}\n".encode("utf-8", "surrogateescape")
                )
        self._rows = np.array(rows, np.int64).reshape(-1, 5)  # tar, picture at, its bytes, JSON at, its bytes
        self._digest = digest.hexdigest()[:16]
        self._total = len(rows) + self._causes.total()
        self._check_share()
        if not rows:
            found = (
                ", ".join(f"{name!r} ({n})" for name, n in sorted(splits.items(), key=str)) or "no records"
            )
            raise ValueError(
                f"no rows of split {self._split!r} in {self._name()}; its records have {found}; set "
                f"data.source.{split}_split to one of these{self._table()}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        n = len(self)
        if not 0 <= i < n:
            raise IndexError(f"row {i} of a source of {n}")
        for row in (j % n for j in range(i, i + n)):
            if row in self._broken:
                continue
            try:
                picture = decode(self._read(row, 1), size, crop=crop, rng=rng)
            except BadImage as error:
                self._count_broken(row, error.cause)
                continue
            if row != i:
                self._stand_ins[i] = row
            return picture
        raise ValueError(f"no picture of {self._name()} decodes{self._table()}")

    def captions(self, i: int) -> Captions:
        row = self._stand_ins.get(i, i)
        data = self._read(row, 3)
        return _captions(_parse(data) or {}, self._config, self._languages) if data else {}

    @property
    def stand_ins(self) -> dict[int, int]:
        return dict(self._stand_ins)

    def report(self) -> dict[str, int]:
        return dict(self._causes + Counter(f"picture {cause}" for cause in list(self._broken.values())))

    def identity(self) -> str:
        fields = {"rows": len(self), "digest": self._digest}
        return json.dumps({"kind": "tar", "split": self._split, **fields}, ensure_ascii=False)

    def close(self) -> None:
        """Closes the files; garbage collection does it too."""
        self._finalizer()

    def _read(self, row: int, column: int) -> bytes:
        at, size = (int(x) for x in self._rows[row, column : column + 2])
        return os.pread(self._files[self._rows[row, 0]], size, at)

    def _judge(
        self, number: int, picture: tuple | None, notes: tuple | None
    ) -> tuple[str | None, str | None]:
        """The split of a record (None if it does not say) and why it cannot be used (None if it can)."""
        fields: dict | None = {}
        if notes is not None:
            data = os.pread(self._files[number], notes[1], notes[0]) if notes[1] <= _LARGEST_JSON else b""
            fields = _parse(data)
            if fields is None:
                return None, "broken JSON"
        split = fields.get("split", self._config.train_split)
        split = split if isinstance(split, str) else None
        if picture is None:
            return split, "no picture"
        if picture[1] == 0:
            return split, "picture empty"
        if self._languages and notes is None:
            return split, "no JSON"
        if self._languages and not _captions(fields, self._config, self._languages):
            return split, f"no caption in {' or '.join(self._languages)}"
        return split, "split is not a text" if split is None else None

    def _count_broken(self, row: int, cause: str) -> None:
        with self._lock:
            self._broken[row] = cause
        self._check_share()

    def _check_share(self) -> None:
        bad = self._causes.total() + len(self._broken)
        if bad > self._config.max_bad_share * self._total:
            raise ValueError(
                f"{bad} of {self._total} records of {self._name()} cannot be used, more than the share of "
                f"{self._config.max_bad_share:g} that data.source.max_bad_share allows; mend the files or "
                f"raise it{self._table()}"
            )

    def _table(self) -> str:
        causes = sorted(self.report().items(), key=lambda item: (-item[1], item[0]))
        return "".join(f"\n{count:9d}  {cause}" for cause, count in causes)

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


def _index(path: Path) -> dict[str, tuple[tuple[int, int] | None, tuple[int, int] | None]]:
    """Record name -> where its picture and its JSON are (position, bytes), in order of the tar.

    A member written twice counts as its last copy, as when unpacking; of two pictures of one record the first
    kind in webp, png, jpg, jpeg is taken. Links, folders and hidden files are no records.
    """
    pictures: dict[str, dict[str, tuple[int, int]]] = {}
    notes: dict[str, tuple[int, int]] = {}
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
        name: (next((kinds[k] for k in _PICTURES if k in kinds), None), notes.get(name))
        for name, kinds in pictures.items()
    }


def _parse(data: bytes) -> dict | None:
    """The object that a record's JSON holds, or None."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _captions(fields: dict, names: config.TarSource, languages: Sequence[str]) -> Captions:
    english = fields.get(names.captions_field)
    lists = {
        "en": fields.get("caption") if english is None else english,
        "zh": fields.get(names.captions_zh_field),
    }
    captions = {}
    for language in languages:
        texts = lists.get(language)
        texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
        kept = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
        if kept:
            captions[language] = kept
    return captions
