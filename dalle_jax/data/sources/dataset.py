"""What every source is (`Source`), and what sources of stored pictures share (`StoredDataset`).

A row index means the same row for as long as the files stay as they are, also when some of their pictures
turn out broken: those are replaced, picture, captions and label, by the next row whose picture decodes, and
are counted by cause. So no other row moves, in this run or after a resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from dalle_jax.data.images import (
    ANY_SIZE,
    BadImageError,
    Crop,
    ImageLimits,
    check_sides,
    crop_and_resize,
    decode_image,
)

Split = Literal["train", "eval"]
Captions = dict[str, tuple[str, ...]]  # language -> its captions, at least one each

IMAGE_EXTENSIONS = (".webp", ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
EXCLUDED = "excluded"  # the cause of a row that is left out by wish
_MOST_LISTED = 10_000  # names of unusable records written to the run directory; the counts have no limit


class Dataset(Protocol):
    """Rows by index, 0 to len - 1; safe to read from many threads."""

    classes: tuple[str, ...]  # names of the labels; () for a source without labels

    def __len__(self) -> int: ...

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        """Picture of row i, uint8 (size, size, 3). `rng` draws the random crop."""
        ...

    def captions(self, i: int) -> Captions:
        """Captions of row i. Of a row whose picture was replaced, those of the replacement: read it first."""
        ...

    def label(self, i: int) -> int | None:
        """Class of row i, an index into `classes`, or None. Follows a replaced picture, as captions do."""
        ...

    @property
    def replacements(self) -> dict[int, int]:
        """Rows whose picture did not decode, of those read so far, and the row that each one shows
        instead."""
        ...

    def report(self) -> dict[str, int]:
        """Records that cannot be used, cause -> count, found so far."""
        ...

    def log_to(self, path: Path) -> None:
        """Lists unusable records, those known and those found later, as lines of the JSON file `path`."""
        ...

    def fingerprint(self) -> str:
        """JSON that is equal for two sources if their rows are."""
        ...

    def take_read_errors(self) -> Any:
        """What reading found out since the last call, or since the source was unpickled: for `add_read_errors` of the
        source that was pickled. None for nothing."""
        ...

    def add_read_errors(self, findings: Any) -> None:
        """Counts and lists what another process found; raises as `image` does above the share of unusable records."""
        ...


class ReadErrors(NamedTuple):
    """What reading pictures told of their source."""

    broken: dict[int, str]  # row -> cause
    replacements: dict[int, int]  # row -> row shown instead


class StoredDataset:
    """Rows whose pictures are stored. A subclass finds its records when made, counts those that cannot be
    used with `_reject`, then calls `_found` and answers `_picture`, `_said` and `_name_of` by row."""

    classes: tuple[str, ...] = ()

    def __init__(self, max_bad_fraction: float, languages: Sequence[str], limits: ImageLimits = ANY_SIZE):
        self._max_bad_share, self._languages, self._limits = max_bad_fraction, tuple(languages), limits
        self._causes: Counter[str] = Counter()
        self._listed: list[tuple[str, str]] = []  # name and cause of unusable records
        self._broken: dict[int, str] = {}  # row -> why its picture cannot be used
        self._stand_ins: dict[int, int] = {}
        self._lock = threading.Lock()
        self._log: Path | None = None
        self._count = 0
        self._excluded = 0  # of the broken ones, those that nobody wants
        self._taken = (0, 0)  # of the broken rows and stand-ins, by take_read_errors

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process lists nothing itself."""
        with self._lock:
            return {**self.__dict__, "_lock": None, "_log": None, "_listed": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        self._taken = (len(self._broken), len(self._stand_ins))

    # --- what a subclass answers

    def _picture(self, row: int) -> bytes | np.ndarray:
        """The stored picture: a file's bytes, or uint8 (H, W, 3). Raises BadImage."""
        raise NotImplementedError

    def _said(self, row: int) -> Captions:
        raise NotImplementedError

    def _label_of(self, row: int) -> int | None:
        return None

    def _name_of(self, row: int) -> str:
        raise NotImplementedError

    def _name(self) -> str:
        """The source, for messages."""
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """What `identity` is made of."""
        raise NotImplementedError

    def _reject(self, name: str, cause: str) -> None:
        self._causes[cause] += 1
        if len(self._listed) < _MOST_LISTED:
            self._listed.append((name, cause))

    def _found(self, rows: int) -> None:
        self._count = rows
        self._check_share()

    def exclude(self, names: Collection[str]) -> None:
        """Leaves out the records of these names: their rows show the next row instead, so no other row moves.

        Raises ValueError if there are names and no row has one of them, or if every row does.
        """
        wanted = set(names)
        rows = [row for row in range(len(self)) if self._name_of(row) in wanted] if wanted else []
        if wanted and not rows:
            raise ValueError(
                f"none of the {len(wanted)} names is a record of {self._name()}, whose names are like "
                f"{self._name_of(0)!r}; give the names that `dalle-jax data PATH --duplicates` writes for it"
            )
        if rows and len(rows) == len(self):
            raise ValueError(f"every row of {self._name()} is excluded; leave some of its {len(rows)} rows")
        self._excluded = len(rows)
        self._broken.update(dict.fromkeys(rows, EXCLUDED))
        self._listed += [(self._name_of(row), f"picture {EXCLUDED}") for row in rows]
        for row in reversed(rows):
            after = (row + 1) % len(self)
            while after in self._broken and after not in self._stand_ins:  # a stretch that goes over the end
                after = (after + 1) % len(self)
            self._stand_ins[row] = self._stand_ins.get(after, after)

    # --- what a subclass gets

    def __len__(self) -> int:
        return self._count

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        n = len(self)
        if not 0 <= i < n:
            raise IndexError(f"row {i} of a source of {n}")
        for row in (j % n for j in range(i, i + n)):
            if row in self._broken:
                continue
            try:
                picture = self._square(self._picture(row), size, crop, rng)
            except BadImageError as error:
                self._count_broken(row, error.cause)
                continue
            if row != i:
                self._stand_ins[i] = row
            return picture
        raise ValueError(f"no picture of {self._name()} decodes{self._table()}")

    def stored(self, i: int) -> bytes | np.ndarray:
        """The picture of row i as it is stored: a file's bytes, or uint8 (H, W, 3). Raises BadImage, also for
        bytes that do not decode; nothing stands in."""
        if self._broken.get(i) == EXCLUDED:
            raise BadImageError(EXCLUDED, f"{self.name(i)} is excluded")
        data = self._picture(i)
        self._square(data, 8, "center", None)
        return data

    def _square(
        self, data: bytes | np.ndarray, size: int, crop: Crop, rng: np.random.Generator | None
    ) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            return decode_image(data, size, crop=crop, rng=rng, limits=self._limits)
        check_sides(data.shape[1], data.shape[0], self._limits)
        return crop_and_resize(data, size, crop=crop, rng=rng)

    def name(self, i: int) -> str:
        """What row i is called where it is stored."""
        return self._name_of(i)

    def captions(self, i: int) -> Captions:
        return self._said(self._stand_ins.get(i, i))

    def label(self, i: int) -> int | None:
        return self._label_of(self._stand_ins.get(i, i))

    @property
    def replacements(self) -> dict[int, int]:
        return dict(self._stand_ins)

    def fingerprint(self) -> str:
        fields = self._identity()
        if self._excluded:
            rows = sorted(row for row, cause in self._broken.items() if cause == EXCLUDED)
            fields["excluded"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        return json.dumps(fields, ensure_ascii=False)

    def take_read_errors(self) -> ReadErrors | None:
        had, self._taken = self._taken, (len(self._broken), len(self._stand_ins))
        if had == self._taken:
            return None
        pairs = zip((self._broken, self._stand_ins), had, strict=True)
        return ReadErrors(*(dict(islice(known.items(), n, None)) for known, n in pairs))

    def add_read_errors(self, findings: ReadErrors) -> None:
        self._stand_ins.update(findings.replacements)
        for row, cause in findings.broken.items():
            self._count_broken(row, cause)

    def report(self) -> dict[str, int]:
        return dict(self._causes + Counter(f"picture {cause}" for cause in list(self._broken.values())))

    def log_to(self, path: Path) -> None:
        with self._lock:
            self._log, known, self._listed = path, self._listed, []
            self._write(known)

    def _write(self, found: list[tuple[str, str]]) -> None:
        """Adds records to the log that it does not list yet; it is small, so it is read whole."""
        if not found:
            return
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        have = set(lines)
        new = [json.dumps({"name": name, "cause": cause}) for name, cause in found]
        new = [line for line in dict.fromkeys(new) if line not in have][: max(0, _MOST_LISTED - len(lines))]
        if new:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write("\n".join(new) + "\n")

    def _count_broken(self, row: int, cause: str) -> None:
        with self._lock:
            if row in self._broken:
                return
            self._broken[row] = cause
            found = (self._name_of(row), f"picture {cause}")
            if self._log is not None:
                self._write([found])
            elif len(self._listed) < _MOST_LISTED:
                self._listed.append(found)
        self._check_share()

    def _check_share(self) -> None:
        bad = self._causes.total() + len(self._broken) - self._excluded
        total = self._count + self._causes.total()
        if bad > self._max_bad_share * total:
            raise ValueError(
                f"{bad} of {total} records of {self._name()} cannot be used, more than the share of "
                f"{self._max_bad_share:g} that data.source.max_bad_fraction allows; mend the files or "
                f"raise it{self._table()}"
            )

    def _table(self) -> str:
        causes = sorted(self.report().items(), key=lambda item: (-item[1], item[0]))
        return "".join(f"\n{count:9d}  {cause}" for cause, count in causes)


def read_excluded_names(names_file: str) -> list[str]:
    """The names of records in a list: a line of JSON each, with `train` as `dalle-jax data PATH --duplicates` writes
    it or `name`, or the bare name. Raises FileNotFoundError, or ValueError for a line of something else."""
    try:
        lines = expand_path(names_file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.source.exclude: no file {names_file!r}; want a list of names"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.source.exclude: {names_file} cannot be read ({error})") from None
    names = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = parse_json_object(line) if line.lstrip().startswith("{") else {"name": line.strip()}
        name = next(((fields or {})[f] for f in ("train", "name") if f in (fields or {})), None)
        if not isinstance(name, str):
            raise ValueError(
                f"data.source.exclude: line {number} of {names_file} names no record ({line[:60]!r}); want a name, or "
                'JSON with "train" or "name"'
            )
        names.append(name)
    return names


def captions_from_fields(fields: dict, names: dict[str, Sequence[str]], languages: Sequence[str]) -> Captions:
    """The captions that a record's fields hold. names: language -> field names, the first that is there
    counts; a field is a text or a list of texts, what is empty or no text is left out."""
    captions = {}
    for language in languages:
        texts = next((fields[n] for n in names.get(language, ()) if fields.get(n) is not None), None)
        texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
        kept = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
        if kept:
            captions[language] = kept
    return captions


def class_captions(name: str, templates: Sequence[str], languages: Sequence[str]) -> Captions:
    """The captions of a class: its name in each template, in place of `{}`. English only."""
    name = name.replace("_", " ").strip()
    return {"en": tuple(t.replace("{}", name) for t in templates)} if "en" in languages and name else {}


def parse_json_object(data: bytes | str) -> dict | None:
    """The object that JSON text holds, or None."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def expand_path(path: str) -> Path:
    return Path(os.path.expanduser(path))
