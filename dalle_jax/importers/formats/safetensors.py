"""The safetensors format: read by the library of that name, written part by part, which that library cannot.

A file is a JSON table of names, dtypes, shapes and places, then the bytes of the arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dalle_jax.files.atomic import atomic_path
from dalle_jax.importers.tensors import Tensor, Tensors, check_tensor_name

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


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
    with atomic_path(path) as beside, open(beside, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, (dtype, _) in entries.items():
            for piece in parts(name):
                if piece.dtype != dtype:
                    raise ValueError(f"array {name} is made of {piece.dtype}; want {np.dtype(dtype)}")
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
            if file.tell() != 8 + len(header) + table[name]["data_offsets"][1]:
                raise ValueError(f"array {name} is made of pieces that do not fill it")


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, in memory, and its metadata. Raises what `lazy_safetensors` raises."""
    found, metadata = lazy_safetensors(path)
    return {name: tensor.read() for name, tensor in found.items()}, metadata


def lazy_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Reads the table of a file: its arrays, each copied from the file when it is read, and its metadata.

    Raises:
      ValueError: for a file that is cut off or is not of this format, and for entries that overlap, leave gaps or are
        of a dtype or shape that NumPy lacks.
    """
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        reason = ascii(str(error)[:200])[1:-1]  # it may quote the file
        raise ValueError(
            f"Expected a whole safetensors file, got {path}: {reason}. Copy or export it again."
        ) from None
    arrays = {}
    for name in file.keys():  # noqa: SIM118
        check_tensor_name(name, path)
        entry = file.get_slice(name)
        dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
        if dtype not in _DTYPES or len(shape) > 64:
            raise ValueError(
                f"{path}: Expected array {name} of a dtype in {', '.join(_DTYPES)} and at most 64 axes, got {dtype} of "
                f"{len(shape)} axes. Convert it first."
            )
        arrays[name] = Tensor(shape, np.dtype(_DTYPES[dtype]), partial(file.get_tensor, name))
    return arrays, file.metadata() or {}
