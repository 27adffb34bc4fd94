"""Flax's msgpack files (`flax_model.msgpack`): nested maps of arrays, which are memory-mapped.

The reader supports the MessagePack types of such files (maps, lists, strings, numbers, bytes) and Flax's extensions: 1,
an array as (shape, dtype, bytes), and arrays over 1 GiB in chunks. Names in the tree are joined by `/`.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dalle_jax.importers.tensors import Tensor, Tensors, check_tensor_name

_DTYPES = {
    np.dtype(t).name: np.dtype(t)
    for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8,
              np.uint64, np.uint32, np.uint16, np.uint8, np.bool_)
}  # fmt: skip
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_LENGTHS = {  # code -> (format of the length, kind)
    0xC4: (">B", "bytes"), 0xC5: (">H", "bytes"), 0xC6: (">I", "bytes"),
    0xC7: (">B", "ext"), 0xC8: (">H", "ext"), 0xC9: (">I", "ext"),
    0xD9: (">B", "text"), 0xDA: (">H", "text"), 0xDB: (">I", "text"),
    0xDC: (">H", "list"), 0xDD: (">I", "list"), 0xDE: (">H", "map"), 0xDF: (">I", "map"),
}  # fmt: skip
_MAX_VALUES = 1 << 20  # maps, lists, texts and numbers: an array takes about 8
_MAX_TEXT = 1 << 12  # bytes of one name
_CHUNKED = "__msgpack_chunked_array__"


class _Bytes(NamedTuple):
    """A range of bytes of the file, not read."""

    start: int
    count: int


def read_flax(path: Path) -> Tensors:
    """Open the arrays by their names in the tree, `a/b/c`; no array is read.

    Raises:
      ValueError: The file is cut off (the message names the array) or not of this format.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        reader = _Reader(file, path, size)
        tree = reader.value(0)
        if not isinstance(tree, dict):
            raise ValueError(
                f"Expected a Flax file with a map of arrays, got {path} with a {type(tree).__name__}."
            )
        if file.tell() != size:
            raise ValueError(
                f"Expected a Flax file with nothing after its map, got {path} with {size - file.tell()} more bytes."
            )
    found: Tensors = {}
    _collect(tree, "", found, path)
    if not found:
        raise ValueError(f"Expected the parameters of a model, got {path} without arrays.")
    return found


class _Reader:
    """Reads values from a file; bytes are skipped and represented by their range."""

    def __init__(self, file: Any, path: Path, size: int):
        self.file, self.path, self.size, self.keys, self.values = file, path, size, [], 0

    def _take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise self._cut()
        return data

    def _cut(self) -> ValueError:
        return ValueError(f"{self.path} is cut off in array {'/'.join(self.keys) or '(the first)'}")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        if depth > 64:
            raise ValueError(
                f"{self.path}: Expected maps nested at most 64 deep, got more at {'/'.join(self.keys)}."
            )
        self.values += 1
        if self.values > _MAX_VALUES:
            raise ValueError(f"{self.path}: Expected a Flax file of at most {_MAX_VALUES} values")
        code = self._take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 256
        if code < 0x90:
            return self._map(code & 15, depth)
        if code < 0xA0:
            return [self.value(depth + 1) for _ in range(code & 15)]
        if code < 0xC0:
            return self._text(code & 31)
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        if 0xD4 <= code <= 0xD8:
            return self._extension(1 << (code - 0xD4), depth)
        if code not in _LENGTHS:
            raise ValueError(
                f"Expected a Flax file, got {self.path} with byte {code:#x} at {self.file.tell() - 1}."
            )
        form, kind = _LENGTHS[code]
        length = self._number(form)
        match kind:
            case "bytes":
                return self._skip(length)
            case "ext":
                return self._extension(length, depth)
            case "text":
                return self._text(length)
            case "list":
                if length > self.size - self.file.tell():
                    raise self._cut()
                return [self.value(depth + 1) for _ in range(length)]
        return self._map(length, depth)

    def _skip(self, count: int) -> _Bytes:
        start = self.file.tell()
        if start + count > self.size:
            raise self._cut()
        self.file.seek(start + count)
        return _Bytes(start, count)

    def _text(self, length: int) -> str:
        if length > self.size - self.file.tell():
            raise self._cut()
        if length > _MAX_TEXT:
            raise ValueError(
                f"{self.path}: Expected text of at most {_MAX_TEXT} bytes, got {length} at {'/'.join(self.keys)}."
            )
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"Expected a Flax file, got {self.path} with a name in {'/'.join(self.keys)} that is not text."
            ) from None

    def _map(self, length: int, depth: int) -> dict[str, Any]:
        if length > self.size - self.file.tell():
            raise self._cut()
        found: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                shown = repr(key) if isinstance(key, str) else f"of a {type(key).__name__}"
                raise ValueError(
                    f"{self.path}: {'/'.join(self.keys)} has the name {shown}, no text or there twice"
                )
            self.keys.append(key)
            check_tensor_name("/".join(self.keys), self.path)
            found[key] = self.value(depth + 1)
            self.keys.pop()
        return found

    def _extension(self, length: int, depth: int) -> Any:
        kind = self._number(">b")
        place = self._skip(length)
        if kind != 1:  # complex numbers and NumPy scalars: no parameters
            return None
        self.file.seek(place.start)
        array = self.value(depth + 1)
        name = "/".join(self.keys)
        if self.file.tell() != place.start + length:
            raise ValueError(f"{self.path}: array {name} does not fill the {length} bytes that it has")
        match array:
            case [list(shape), str(kind), _Bytes() as data] if (
                kind in _DTYPES and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)
            ):
                if math.prod(shape) * _DTYPES[kind].itemsize == data.count:
                    return _tensor(self.path, tuple(shape), _DTYPES[kind], data.start)
                raise ValueError(
                    f"{self.path}: array {name} of {kind} {shape} cannot lie in {data.count} bytes"
                )
        raise ValueError(f"{self.path}: array {name} has an entry that is not understood")


def _tensor(path: Path, shape: tuple[int, ...], dtype: np.dtype, start: int) -> Tensor:
    def read() -> np.ndarray:
        return np.memmap(path, dtype, "r", start, shape) if math.prod(shape) else np.empty(shape, dtype)

    return Tensor(shape, dtype, read)


def _collect(tree: Any, prefix: str, found: Tensors, path: Path) -> None:
    if isinstance(tree, Tensor):
        found[prefix[:-1]] = tree
    elif isinstance(tree, dict) and _CHUNKED in tree:
        found[prefix[:-1]] = _joined(tree, prefix[:-1], path)
    elif isinstance(tree, dict):
        for name, value in tree.items():
            _collect(value, f"{prefix}{name}/", found, path)


def _joined(tree: dict[str, Any], name: str, path: Path) -> Tensor:
    """An array that is stored in flat chunks."""
    try:
        shape = tuple(int(tree["shape"][str(i)]) for i in range(min(len(tree["shape"]), 65)))
        chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
        whole = len(shape) <= 64 and min(shape) >= 0
        whole = whole and sum(math.prod(chunk.shape) for chunk in chunks) == math.prod(shape)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: array {name} has chunks that are not understood") from None
    if not whole or len({chunk.dtype for chunk in chunks}) != 1:
        raise ValueError(f"{path}: array {name} {shape} is not what its {len(chunks)} chunks give")

    def read() -> np.ndarray:
        return np.concatenate([chunk.read().reshape(-1) for chunk in chunks]).reshape(shape)

    return Tensor(shape, chunks[0].dtype, read)
