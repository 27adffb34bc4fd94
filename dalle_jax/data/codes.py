"""Image codes encoded ahead by a trained image tokenizer, so that a Transformer trains without images.

`dalle-jax encode RUN --data` writes a directory of codes. Shard k has rows [k R, (k + 1) R) of the training source,
each with its codes, captions and class; a shard is written atomically. `codes.json` describes the source and the
tokenizer. The subdirectory `eval` has the same for rows of the evaluation split. N rows, n codes in each, R rows in a
shard.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from array_record.python.array_record_module import (  # ty: ignore[import-not-found] a compiled module without stubs
    ArrayRecordReader,
    ArrayRecordWriter,
)

from dalle_jax import config
from dalle_jax.data.images import Crop
from dalle_jax.data.sources import Captions, Split
from dalle_jax.files.atomic import atomic_path, write_atomic

_FORMAT = 2
_INFO_FILE = "codes.json"
_MAX_OPEN_SHARDS = 256  # a reader holds a file and buffers
EVAL_DIR = "eval"  # subdirectory of the evaluation rows
# Fields of a source that do not change its rows: where it is stored, and what concerns the other split.
_LOCATION_FIELDS = ("path", "data_dir", "max_bad_fraction")
_OTHER_SPLIT_FIELDS = {"train": ("eval_split", "eval_fraction"), "eval": ("train_split", "exclude")}
_ENCODE_AGAIN = "run the same `dalle-jax encode RUN --data` again"


@dataclass(frozen=True, kw_only=True)
class CodesInfo:
    """Description of a directory of codes."""

    rows: int
    shard_rows: int  # rows of every shard but the last
    num_codes: int  # codes of a row
    vocab: int  # codes of the image tokenizer
    image_size: int  # side of the encoded images, pixels
    crop: Literal["center", "none"]  # how they were cut out
    tokenizer: str  # fingerprint of the image tokenizer
    languages: tuple[config.Language, ...]  # of the captions
    classes: tuple[str, ...]  # names of the labels
    source: str  # `describe_codes_source` of the source
    fingerprint: str  # `Dataset.fingerprint` of the source
    format: int = _FORMAT

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def shard(self, k: int) -> range:
        """Return the rows of shard k."""
        return range(k * self.shard_rows, min((k + 1) * self.shard_rows, self.rows))


def describe_codes_source(source: config.SourceConfig, split: Split = "train") -> str:
    """Return JSON of a source that is equal for two configurations if the same records become rows of the split."""
    dropped = (*_LOCATION_FIELDS, *_OTHER_SPLIT_FIELDS[split])

    def without_dropped(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_dropped(v) for name, v in value.items() if name not in dropped}
        return [without_dropped(v) for v in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(without_dropped(dataclasses.asdict(source)), ensure_ascii=False, sort_keys=True)


def open_codes_dir(directory: str | os.PathLike, info: CodesInfo) -> None:
    """Create a directory of codes, or check that an existing one has the same description.

    Several processes may call this at once.

    Raises:
      ValueError: The directory has other codes or other files.
    """
    info_file = Path(directory) / _INFO_FILE
    info_file.parent.mkdir(parents=True, exist_ok=True)
    if not info_file.exists():
        files = sorted(p.name for p in info_file.parent.iterdir() if not p.name.startswith("."))
        if files and _INFO_FILE not in files:  # else another process has just created it
            raise ValueError(
                f"Expected an empty directory or one of codes, got {directory} with {', '.join(files[:5])}. Choose "
                "another --out."
            )
        if not files:
            write_atomic(info_file, json.dumps(_to_dict(info), indent=2, ensure_ascii=False) + "\n")
    old, new = _to_dict(_read_codes_info(directory)), _to_dict(info)
    if differences := [f"{n} {old[n]!r} there, {new[n]!r} now" for n in new if old[n] != new[n]]:
        raise ValueError(
            f"{directory} holds other codes ({'; '.join(differences)}). Choose another --out or delete it."
        )


def _read_codes_info(directory: str | os.PathLike) -> CodesInfo:
    """Read the description of a directory of codes.

    Raises:
      ValueError: The directory is missing, damaged, or no directory of codes.
    """
    path = Path(directory) / _INFO_FILE
    expected = (
        "Expected in data.codes a directory that `dalle-jax encode RUN --data CONFIG --out DIR` wrote: "
    )
    if Path(directory).is_file():
        raise ValueError(f"{expected}{directory} is a file.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("format") != _FORMAT:
            raise ValueError(f"format {fields.get('format')!r}, this version reads {_FORMAT}")
        info = config.from_json(CodesInfo, json.dumps(fields))
    except FileNotFoundError:
        what = "does not exist" if not Path(directory).exists() else f"has no {_INFO_FILE}"
        raise ValueError(f"{expected}{directory} {what}.") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"data.codes: {path} is damaged ({error}). Encode again.") from None
    if min(info.rows, info.shard_rows, info.num_codes, info.vocab) < 1:
        raise ValueError(f"data.codes: {path} describes no rows or no codes. Encode again.")
    return info


def is_shard_complete(directory: str | os.PathLike, info: CodesInfo, k: int) -> bool:
    """Return whether shard k exists with all its rows."""
    path = _shard_path(Path(directory), info, k)
    try:
        return path.is_file() and _open_shard(path).num_records() == len(info.shard(k))
    except Exception:  # array_record raises errors of several kinds for damaged files
        return False


class ShardWriter:
    """Writes one shard atomically: `add` its rows in order, inside a `with` block."""

    def __init__(self, directory: str | os.PathLike, info: CodesInfo, k: int):
        self._info, self._rows, self._added = info, info.shard(k), 0
        self._path = _shard_path(Path(directory), info, k)
        for stale in self._path.parent.glob(f".{self._path.name}.*"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        self._file = atomic_path(self._path)
        self._dtype = _codes_dtype(info.vocab)

    def __enter__(self) -> ShardWriter:
        # One record per group for random access; codes hardly compress.
        self._writer = ArrayRecordWriter(str(self._file.__enter__()), "group_size:1,uncompressed")
        return self

    def add(self, codes: np.ndarray, captions: Captions, label: int | None) -> None:
        """Add one row.

        Args:
          codes: Integers (n,) in [0, vocab).
          captions: Captions by language.
          label: Class, or None.

        Raises:
          ValueError: `codes` has another shape or range.
        """
        n, vocab, row = self._info.num_codes, self._info.vocab, self._rows.start + self._added
        if codes.shape != (n,) or codes.min() < 0 or codes.max() >= vocab:
            raise ValueError(
                f"Expected codes ({n},) in [0, {vocab}) for row {row}, got {codes.shape} from {codes.min()} to "
                f"{codes.max()}."
            )
        fields = json.dumps([label, captions], ensure_ascii=False, separators=(",", ":"))
        self._writer.write(codes.astype(self._dtype).tobytes() + fields.encode("utf-8", "replace"))
        self._added += 1

    def __exit__(self, kind, error, traceback) -> None:
        self._writer.close()
        if kind is None and self._added < len(self._rows):
            error = ValueError(f"Expected {len(self._rows)} rows in {self._path.name}, got {self._added}.")
        self._file.__exit__(None if error is None else type(error), error, traceback)
        if kind is None and error is not None:
            raise error


class CodesDataset:
    """The rows of a directory of codes, in the order of the encoded source; any number of threads may read."""

    def __init__(self, directory: str | os.PathLike):
        """Open a directory of codes.

        Raises:
          ValueError: A shard is missing, or what `_read_codes_info` raises.
        """
        self._directory, self.info = Path(directory), _read_codes_info(directory)
        paths = [_shard_path(self._directory, self.info, k) for k in range(self.info.shards)]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(
                f"data.codes: {len(missing)} of {self.info.shards} shards are missing in {directory}, the first is "
                f"{missing[0].name}. To resume, {_ENCODE_AGAIN}."
            )
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()
        self._dtype = _codes_dtype(self.info.vocab)

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    @property
    def parts(self) -> Sequence[CodesDataset]:
        return (self,)

    def __len__(self) -> int:
        return self.info.rows

    def row(self, i: int) -> tuple[np.ndarray, Captions, int | None]:
        """Read row i: its codes, int32 (n,), its captions and its class. Raises ValueError for a damaged shard."""
        if not 0 <= i < len(self):
            raise IndexError(f"Expected a row in [0, {len(self)}), got {i}.")
        k, position = divmod(i, self.info.shard_rows)
        n, size = self.info.num_codes, self._dtype.itemsize
        try:
            (record,) = self._reader(k).read([position])
            codes = np.frombuffer(record, self._dtype, n).astype(np.int32)
            label, captions = json.loads(record[n * size :])
            if codes.min() < 0 or codes.max() >= self.info.vocab:
                raise ValueError(f"codes from {codes.min()} to {codes.max()}, not in [0, {self.info.vocab})")
        except Exception as error:
            path = _shard_path(self._directory, self.info, k)
            raise ValueError(
                f"data.codes: cannot read row {i} in {path} ({error}). Delete that file and {_ENCODE_AGAIN}."
            ) from None
        return codes, {language: tuple(texts) for language, texts in captions.items()}, label

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> NoReturn:
        """Raise ValueError: the images are not stored."""
        raise ValueError(f"{self._directory} holds codes, not images. Use `row`.")

    def captions(self, i: int) -> Captions:
        return self.row(i)[1]

    def label(self, i: int) -> int | None:
        return self.row(i)[2]

    def name(self, i: int) -> str:
        return f"row {i} of {self._directory}"

    @property
    def replacements(self) -> dict[int, int]:
        return {}

    def report(self) -> dict[str, int]:
        return {}

    def log_to(self, path: Path) -> None:
        pass  # `encode` has logged what could not be used

    def fingerprint(self) -> str:
        return self.info.fingerprint

    def exclude(self, names: Collection[str]) -> None:
        raise ValueError("Codes have no records to exclude. Encode the source again with its `exclude`.")

    def take_read_errors(self) -> None:
        return None

    def add_read_errors(self, errors: None) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict(), "_lock": None}  # another process opens its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _reader(self, k: int) -> ArrayRecordReader:
        with self._lock:
            if (reader := self._readers.get(k)) is None:
                reader = _open_shard(_shard_path(self._directory, self.info, k))
                if (rows := reader.num_records()) != len(self.info.shard(k)):
                    raise ValueError(f"{rows} rows, not {len(self.info.shard(k))}")
                self._readers[k] = reader
                if len(self._readers) > _MAX_OPEN_SHARDS:
                    self._readers.popitem(last=False)  # closed when the last thread that reads it is done
            self._readers.move_to_end(k)
            return reader


def check_codes_dataset(rows: CodesDataset, data: config.DataConfig, split: Split = "train") -> None:
    """Check that codes were encoded from the data of a configuration.

    Raises:
      ValueError: Without codes, a run on `data` would read other rows, captions or images of the split.
    """
    info, crop = rows.info, "none" if data.crop == "none" else "center"
    old, new = json.loads(info.source), json.loads(describe_codes_source(data.source, split))
    differences = [
        f"data.source.{name} {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if set(info.languages) != set(data.languages):
        differences.append(f"captions in {', '.join(info.languages)} there, {', '.join(data.languages)} here")
    if info.crop != crop:
        differences.append(f"crop {info.crop!r} there, {crop!r} here")
    if differences:
        raise ValueError(
            f"data.codes: {rows.directory} was encoded from other data ({'; '.join(differences)}). Use its "
            "configuration "
            "or encode this one."
        )


def _shard_path(directory: Path, info: CodesInfo, k: int) -> Path:
    return directory / f"codes-{k:05d}-of-{info.shards:05d}.array_record"


def _open_shard(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(
        str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32_768
    )


def _codes_dtype(vocab: int) -> np.dtype:
    return np.dtype("<u2" if vocab <= 2**16 else "<i4")


def _to_dict(info: CodesInfo) -> dict[str, Any]:
    return json.loads(config.to_json(info))
