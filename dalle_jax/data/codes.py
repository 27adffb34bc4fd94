"""Image codes encoded ahead of time by a trained tokenizer, so that the Transformer trains without pictures.

One npz file: row i holds the codes of row i of the train source, its picture cropped to the centre. N rows,
n codes in each.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalle_jax.data.images import Crop
from dalle_jax.data.sources import Captions, Source

_FORMAT = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """What a file of codes holds."""

    path: str
    codes_Nn: np.ndarray  # uint16 or int32, each in [0, vocab)
    source_json: str  # `identity()` of the source that was encoded
    tokenizer: str  # fingerprint of the tokenizer that encoded it
    image_size: int  # side of the pictures that were encoded, pixels
    vocab: int  # codes of the tokenizer
    complete: bool  # whether every row of the source is here; if not, the first rows are
    stand_ins: dict[int, int]  # rows whose picture is broken -> the row encoded in their place

    def __len__(self) -> int:
        return len(self.codes_Nn)


def save_codes(
    path: str | os.PathLike,
    codes: np.ndarray,
    *,
    source_json: str,
    tokenizer: str,
    image_size: int,
    vocab: int,
    complete: bool,
    stand_ins: Mapping[int, int] | None = None,
) -> None:
    """Writes the codes of the first N rows of a source, whole or not at all.

    codes: integers (N, n) in [0, vocab).
    source_json: `source.identity()`.
    complete: N is the length of the source.
    stand_ins: `source.stand_ins` after encoding, so that captions follow a replaced picture.

    Raises ValueError, naming the row, for a code outside [0, vocab).
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer) or codes.size == 0:
        raise ValueError(
            f"want codes as integers (N, n) with at least one row, got {codes.dtype} {codes.shape}"
        )
    _check_range(codes, vocab, "these codes")
    about = {
        "format": _FORMAT,
        "source": json.loads(source_json),
        "tokenizer": tokenizer,
        "image_size": int(image_size),
        "vocab": int(vocab),
        "complete": bool(complete),
        "stand_ins": [[int(a), int(b)] for a, b in (stand_ins or {}).items() if a < len(codes)],
    }
    out = io.BytesIO()
    small = np.uint16 if vocab <= 2**16 else np.int32
    np.savez(out, codes=codes.astype(small), about=np.array(json.dumps(about, ensure_ascii=False)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(out.getbuffer())
    os.replace(part, path)


def load_codes(path: str | os.PathLike) -> Codes:
    """Reads a file that `save_codes` wrote. Raises ValueError, naming the path, if it is missing or
    broken."""
    again = "write it again with `dalle-jax encode RUN --data`"
    try:
        with np.load(path, allow_pickle=False) as file:
            codes_Nn, about = file["codes"], json.loads(str(file["about"]))
        codes = Codes(
            path=str(path),
            codes_Nn=codes_Nn,
            source_json=json.dumps(about["source"], ensure_ascii=False),
            tokenizer=str(about["tokenizer"]),
            image_size=int(about["image_size"]),
            vocab=int(about["vocab"]),
            complete=bool(about["complete"]),
            stand_ins={int(a): int(b) for a, b in about["stand_ins"]},
        )
    except FileNotFoundError:
        raise ValueError(f"data.codes: {path} does not exist; {again}") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data.codes: {path} is not a whole file of codes ({error}); {again}") from None
    if codes_Nn.ndim != 2 or not np.issubdtype(codes_Nn.dtype, np.integer) or codes_Nn.size == 0:
        raise ValueError(
            f"data.codes: {path} holds {codes_Nn.dtype} {codes_Nn.shape}, want integers (N, n); {again}"
        )
    _check_range(codes_Nn, codes.vocab, f"data.codes: {path}")
    return codes


class CodesSource:
    """The rows of a train source with codes for pictures: its captions, its length or, if the file holds
    only the first M rows, M. The order in which training sees rows follows from the length, so it is the
    order of `FirstRows(source, M)`. Cropping is that of the encoding, the centre."""

    def __init__(self, codes: Codes, source: Source):
        """Raises ValueError, saying what differs, if `codes` were made from other rows than those of
        `source`."""
        made, here = json.loads(codes.source_json), json.loads(source.identity())
        differing = [
            f"{name} {made.get(name)!r} there, {here.get(name)!r} here"
            for name in sorted({*made, *here})
            if made.get(name) != here.get(name)
        ]
        if differing:
            raise ValueError(
                f"data.codes: {codes.path} was encoded from another source than data.source "
                f"({'; '.join(differing)}); use the source it was made from or encode this one"
            )
        if len(codes) > len(source) or (codes.complete and len(codes) != len(source)):
            kind = "all" if codes.complete else "the first"
            raise ValueError(
                f"data.codes: {codes.path} holds {kind} {len(codes)} rows, data.source has {len(source)}; "
                f"encode again, or give the source {len(codes)} rows"
            )
        self._codes, self._source = codes, source

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def num_codes(self) -> int:
        """Codes in each row."""
        return self._codes.codes_Nn.shape[1]

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that made the codes."""
        return self._codes.tokenizer

    def codes(self, i: int) -> np.ndarray:
        """Codes of row i: int32 (n,)."""
        return self._codes.codes_Nn[i].astype(np.int32)

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        return self._source.image(i, size, crop, rng)

    def captions(self, i: int) -> Captions:
        return self._source.captions(self._codes.stand_ins.get(i, i))

    def label(self, i: int) -> int | None:
        return self._source.label(self._codes.stand_ins.get(i, i))

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.classes

    def log_to(self, path: Path) -> None:
        self._source.log_to(path)

    @property
    def stand_ins(self) -> dict[int, int]:
        return dict(self._codes.stand_ins)

    def report(self) -> dict[str, int]:
        return self._source.report()

    def identity(self) -> str:
        return self._source.identity()


def _check_range(codes_Nn: np.ndarray, vocab: int, whose: str) -> None:
    bad = np.flatnonzero(((codes_Nn < 0) | (codes_Nn >= vocab)).any(axis=1))
    if bad.size:
        row = int(bad[0])
        raise ValueError(
            f"{whose}: row {row} has codes from {codes_Nn[row].min()} to {codes_Nn[row].max()}, want [0, "
            f"{vocab}); encode again with the tokenizer in use"
        )
