"""The safetensors format: a JSON table of names, dtypes, shapes and places, then the bytes of the arrays.

Reading maps the file and runs nothing; every number of the table is checked against the file before it is believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dalle_jax.importers.tensors import Tensor, Tensors

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes beside `path`, then renames. Raises OSError with the name of the file."""
    write_safetensors_parts(
        path,
        {name: (array.dtype, array.shape) for name, array in arrays.items()},
        lambda name: [arrays[name]],
        metadata,
    )


def write_safetensors_parts(
    path: Path,
    entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    parts: Callable[[str], Iterable[np.ndarray]],
    metadata: dict[str, str],
) -> None:
    """The same for arrays that are made while they are written: `parts(name)` gives the array `name` of
    `entries` in pieces, one after another along its first axis. No more than a piece is in memory.

    Raises ValueError where the pieces are not what the entry says, and whatever `parts` raises; then nothing is
    left of the file.
    """
    table: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, (dtype, shape) in entries.items():
        end = place + math.prod(shape) * np.dtype(dtype).itemsize
        table[name] = {
            "dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [place, end],
        }  # fmt: skip
        place = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)  # arrays begin at a multiple of 8
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name, (dtype, _) in entries.items():
                for piece in parts(name):
                    if piece.dtype != dtype:
                        raise ValueError(f"array {name} is made of {piece.dtype}; want {np.dtype(dtype)}")
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
                if file.tell() != 8 + len(header) + table[name]["data_offsets"][1]:
                    raise ValueError(f"array {name} is made of pieces that do not fill it")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, mapped and not yet read, and its metadata. Raises what `tensors` raises."""
    found, metadata = lazy_safetensors(path)
    return {name: tensor.read() for name, tensor in found.items()}, metadata


def lazy_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The arrays of a file, each mapped when it is read, and its metadata.

    Raises ValueError that says what is wrong with a file that is cut off or is not of this format, and names the
    array whose entry does not hold.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is not a whole safetensors file: its table would take {length} bytes")
        try:
            table = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path} is not a safetensors file: its table is not JSON") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} is not a safetensors file: its table is a {type(table).__name__}")
    metadata = table.pop("__metadata__", {})
    arrays = {}
    for name, entry in table.items():
        try:
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
            start, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: array {name} has an entry that is not understood: {entry}") from None
        if min((*shape, start)) < 0 or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: array {name} of {dtype} {shape} cannot lie at bytes {start} to {end}")
        if 8 + length + end > size:
            raise ValueError(f"{path} is cut off: array {name} ends at byte {8 + length + end} of {size}")
        arrays[name] = _tensor(path, dtype, shape, 8 + length + start)
    return arrays, metadata


def _tensor(path: Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    def read() -> np.ndarray:
        return np.memmap(path, dtype, "r", start, shape) if math.prod(shape) else np.empty(shape, dtype)

    return Tensor(shape, dtype, read)
