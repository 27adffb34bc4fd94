"""The safetensors format: a JSON table of names, dtypes, shapes and places, then the bytes of the arrays.

Reading maps the file and runs nothing; every number of the table is checked against the file before it is believed.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


def write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes beside `path`, then renames. Raises OSError with the name of the file."""
    table: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, array in arrays.items():
        end = place + array.nbytes
        table[name] = {
            "dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [place, end],
        }  # fmt: skip
        place = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)  # arrays begin at a multiple of 8
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).tobytes())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, mapped and not yet read, and its metadata.

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
        if end == start:
            arrays[name] = np.empty(shape, dtype)
        else:
            arrays[name] = np.memmap(path, dtype, "r", 8 + length + start, shape)
    return arrays, metadata
