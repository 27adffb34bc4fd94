"""Image codes encoded ahead of time by a trained tokenizer, so that the Transformer trains without pictures.

A directory that `dalle-jax encode RUN --data` writes. Shard k holds rows [k R, (k + 1) R) of the train source, each
with its codes, captions and class; it is written beside its place and renamed when whole. `codes.json` says what
the shards are of. The folder `eval` in it is the same of rows held out for evaluation. N rows, n codes in each, R rows
in a shard.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dalle_jax import config
from dalle_jax.data.sources import Captions, Split
from dalle_jax.files.atomic import atomic_path, write_atomic

_FORMAT = 2
_ABOUT = "codes.json"
_MOST_OPEN = 256  # shards kept open: files and buffers of a reader are not free
EVAL_DIR = "eval"  # folder of the evaluation rows in a directory of codes
# Of a source: where it lies, and what rows of the split do not depend on.
_PLACES = ("path", "data_dir", "max_bad_fraction")
_OTHERS = {"train": ("eval_split", "eval_fraction"), "eval": ("train_split", "exclude")}
_AGAIN = "run the same `dalle-jax encode RUN --data` again"


@dataclass(frozen=True, kw_only=True)
class CodesInfo:
    """What a directory of codes is of."""

    rows: int
    shard_rows: int  # of every shard but the last
    num_codes: int
    vocab: int  # codes of the tokenizer
    image_size: int  # side of the pictures that were encoded, pixels
    crop: Literal["center", "none"]  # how those were cut out
    tokenizer: str  # fingerprint of the tokenizer that encoded them
    languages: tuple[config.Language, ...]  # of the captions
    classes: tuple[str, ...]  # names of the labels
    source: str  # `described()` of the source
    fingerprint: str  # `identity()` of the opened source
    format: int = _FORMAT

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shard(self, k: int) -> range:
        """The rows of shard k."""
        return range(k * self.shard_rows, min((k + 1) * self.shard_rows, self.rows))


def describe_source(source: config.SourceConfig, split: Split = "train") -> str:
    """JSON of a source's configuration that is equal for two sources if the same records become rows of the split."""
    dropped = (*_PLACES, *_OTHERS[split])

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: bare(v) for name, v in value.items() if name not in dropped}
        return [bare(v) for v in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(bare(dataclasses.asdict(source)), ensure_ascii=False, sort_keys=True)


def open_codes_dir(directory: str | os.PathLike, info: CodesInfo) -> None:
    """Makes the directory, or checks that it was begun for the same codes. Any number of processes may call.

    Raises ValueError, saying what differs, for a directory of other codes, and for one of something else.
    """
    about = Path(directory) / _ABOUT
    about.parent.mkdir(parents=True, exist_ok=True)
    if not about.exists():
        found = sorted(p.name for p in about.parent.iterdir() if not p.name.startswith("."))
        if found and _ABOUT not in found:  # else another process began it just now
            raise ValueError(
                f"{directory} is not empty and holds no codes, but {', '.join(found[:5])}; choose another --out"
            )
        if not found:
            write_atomic(about, json.dumps(_plain(info), indent=2, ensure_ascii=False) + "\n")
    have, want = _plain(read_codes_info(directory)), _plain(info)
    if differing := [f"{n} {have[n]!r} there, {want[n]!r} now" for n in want if have[n] != want[n]]:
        raise ValueError(
            f"{directory} holds other codes ({'; '.join(differing)}); choose another --out or delete it"
        )


def read_codes_info(directory: str | os.PathLike) -> CodesInfo:
    """What the directory is of. Raises ValueError, naming it, if it is missing, broken or no directory of codes."""
    path = Path(directory) / _ABOUT
    make = "want a directory that `dalle-jax encode RUN --data CONFIG --out DIR` wrote"
    if Path(directory).is_file():
        raise ValueError(f"data.codes: {directory} is a file; {make}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about.get("format") != _FORMAT:
            raise ValueError(f"format {about.get('format')!r}, this version reads {_FORMAT}")
        info = config.from_json(CodesInfo, json.dumps(about))
    except FileNotFoundError:
        what = "does not exist" if not Path(directory).exists() else f"has no {_ABOUT}"
        raise ValueError(f"data.codes: {directory} {what}; {make}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"data.codes: {path} is broken ({error}); encode again") from None
    if min(info.rows, info.shard_rows, info.num_codes, info.vocab) < 1:
        raise ValueError(f"data.codes: {path} tells of no rows or codes; encode again")
    return info


def is_complete(directory: str | os.PathLike, info: CodesInfo, k: int) -> bool:
    """Whether shard k is there with all its rows."""
    path = _path(Path(directory), info, k)
    try:
        return path.is_file() and _open(path).num_records() == len(info.shard(k))
    except Exception:  # array_record answers damage with errors of several kinds
        return False


class ShardWriter:
    """Writes one shard: `add` its rows in order, inside a `with`; it takes its place when all are there."""

    def __init__(self, directory: str | os.PathLike, info: CodesInfo, k: int):
        self._info, self._rows, self._added = info, info.shard(k), 0
        self._path = _path(Path(directory), info, k)
        for left in self._path.parent.glob(f".{self._path.name}.*"):  # of a process that was killed
            left.unlink(missing_ok=True)
        self._file = atomic_path(self._path)
        self._dtype = _dtype(info.vocab)

    def __enter__(self) -> ShardWriter:
        # A record for itself each, as random access wants it; codes hardly compress.
        self._writer = ArrayRecordWriter(str(self._file.__enter__()), "group_size:1,uncompressed")
        return self

    def add(self, codes: np.ndarray, captions: Captions, label: int | None) -> None:
        """One row: integers (n,) in [0, vocab), its captions by language, its class. Raises ValueError for other
        codes."""
        n, vocab, row = self._info.num_codes, self._info.vocab, self._rows.start + self._added
        if codes.shape != (n,) or codes.min() < 0 or codes.max() >= vocab:
            raise ValueError(
                f"row {row}: codes {codes.shape} from {codes.min()} to {codes.max()}; want ({n},) in [0, {vocab})"
            )
        said = json.dumps([label, captions], ensure_ascii=False, separators=(",", ":"))
        self._writer.write(codes.astype(self._dtype).tobytes() + said.encode("utf-8", "replace"))
        self._added += 1

    def __exit__(self, kind, error, traceback) -> None:
        self._writer.close()
        if kind is None and self._added < len(self._rows):
            error = ValueError(f"{self._added} rows for {self._path.name}; want {len(self._rows)}")
        self._file.__exit__(None if error is None else type(error), error, traceback)
        if kind is None and error is not None:
            raise error


class CodesDataset:
    """The rows of a directory of codes, in the order of the source that was encoded, so that training sees the
    same rows and captions in the same order. Any number of threads may read."""

    def __init__(self, directory: str | os.PathLike):
        """Raises ValueError, saying what to do, unless every shard is there."""
        self._directory, self.info = Path(directory), read_codes_info(directory)
        missing = [k for k in range(self.info.shards) if not _path(self._directory, self.info, k).is_file()]
        if missing:
            raise ValueError(
                f"data.codes: {len(missing)} of {self.info.shards} shards are missing in {directory}, the first is "
                f"{_path(self._directory, self.info, missing[0]).name}; {_AGAIN}, it goes on where it stopped"
            )
        self._open: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()
        self._dtype = _dtype(self.info.vocab)

    def __len__(self) -> int:
        return self.info.rows

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    def row(self, i: int) -> tuple[np.ndarray, Captions, int | None]:
        """Codes of row i, int32 (n,), its captions and its class. Raises ValueError for a damaged shard."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        k, at = divmod(i, self.info.shard_rows)
        n, size = self.info.num_codes, self._dtype.itemsize
        try:
            (record,) = self._reader(k).read([at])
            codes = np.frombuffer(record, self._dtype, n).astype(np.int32)
            label, said = json.loads(record[n * size :])
            if codes.min() < 0 or codes.max() >= self.info.vocab:
                raise ValueError(f"codes from {codes.min()} to {codes.max()}, want [0, {self.info.vocab})")
        except Exception as error:
            name = _path(self._directory, self.info, k)
            raise ValueError(
                f"data.codes: row {i} in {name} cannot be read ({error}); {_mend(name)}"
            ) from None
        return codes, {language: tuple(texts) for language, texts in said.items()}, label

    def captions(self, i: int) -> Captions:
        return self.row(i)[1]

    def take_read_errors(self) -> None:
        return None

    def add_read_errors(self, findings: None) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}  # another process opens its own files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def log_to(self, path: Path) -> None:
        pass  # what could not be used was listed beside the codes when they were made

    def report(self) -> dict[str, int]:
        return {}

    def _reader(self, k: int) -> ArrayRecordReader:
        with self._lock:
            if (reader := self._open.get(k)) is None:
                path = _path(self._directory, self.info, k)
                reader = _open(path)
                if (found := reader.num_records()) != len(self.info.shard(k)):
                    raise ValueError(f"{found} rows, want {len(self.info.shard(k))}")
                self._open[k] = reader
                if len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)  # closes when the last thread that reads it is done
            self._open.move_to_end(k)
            return reader


def check_codes_dataset(rows: CodesDataset, data: config.DataConfig, split: Split = "train") -> None:
    """Raises ValueError, saying what differs, if a run on `data` without codes would see other rows of the split,
    captions or pictures than `rows` holds, as far as the configuration tells."""
    info, want = rows.info, describe_source(data.source, split)
    made, here = json.loads(info.source), json.loads(want)
    crop = "none" if data.crop == "none" else "center"
    differing = [
        f"data.source.{name} {made.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted({*made, *here})
        if made.get(name) != here.get(name)
    ]
    if set(info.languages) != set(data.languages):
        differing.append(f"captions in {', '.join(info.languages)} there, {', '.join(data.languages)} here")
    if info.crop != crop:
        differing.append(f"crop {info.crop!r} there, {crop!r} here")
    if differing:
        raise ValueError(
            f"data.codes: {rows._directory} was encoded from other data ({'; '.join(differing)}); use the "
            "configuration it was made with or encode this one"
        )


def _mend(path: Path) -> str:
    return f"delete that file and {_AGAIN}"


def _path(directory: Path, info: CodesInfo, k: int) -> Path:
    return directory / f"codes-{k:05d}-of-{info.shards:05d}.array_record"


def _open(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(
        str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32_768
    )


def _dtype(vocab: int) -> np.dtype:
    return np.dtype("<u2" if vocab <= 2**16 else "<i4")


def _plain(info: CodesInfo) -> dict[str, Any]:
    return json.loads(config.to_json(info))
