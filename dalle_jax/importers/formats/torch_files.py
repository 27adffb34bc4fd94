"""Files of torch.save: zip archives, the older stream of pickles, TorchScript archives; read without torch.

A zip archive holds `NAME/data.pkl`, a pickle in which each tensor is a view of a storage, and `NAME/data/KEY`, the
uncompressed bytes of each storage, which are memory-mapped. The older format is a magic number, three pickles, the list
of storages, and their bytes one after another. A pickled module gives the tensors of its state dict.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dalle_jax.files.archives import read_zip_directory
from dalle_jax.importers.formats import pickles
from dalle_jax.importers.formats.pickles import Name, Object
from dalle_jax.importers.tensors import Tensor, Tensors, check_tensor_name

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_WRAPPERS = ("state_dict", "model", "module")  # keys under which trainers put a state dict
_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_MAX_TENSORS = 1 << 17
_MAX_DEPTH = 128  # dicts in dicts: a module in a module takes two


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


def read_torch(path: Path) -> Tensors:
    """Open the tensors of a state dict or of a pickled module, by name; no array is read.

    A state dict under the key `state_dict`, `model` or `module` is unwrapped. Time and memory are bounded.

    Raises:
      ValueError: The file is cut off (the message names the tensor) or not of this format.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    tree, places = _read_zip(path) if zipped else _read_legacy(path)
    found: dict[str, _Tensor] = {}
    _collect(path, _unwrapped(tree), "", found, set())
    if not found:
        raise ValueError(f"Expected a checkpoint of a model, got {path} without tensors.")
    return {name: _lazy(path, name, tensor, places) for name, tensor in found.items()}


def _read_zip(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The unpickled tree, and the offset and size of each storage in the file."""
    places = {}
    try:
        entries = read_zip_directory(path)
        roots = [n[: -len("data.pkl")] for n in entries if n.count("/") <= 1 and n.endswith("data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"Expected a zip file made by torch.save, got {path} without one data.pkl.")
        table, order = roots[0] + "data.pkl", roots[0] + "byteorder"
        with open(path, "rb") as file:
            for name, entry in entries.items():
                if name in (table, order) or name.startswith(roots[0] + "data/"):
                    places[name.removeprefix(roots[0])] = _place(file, entry, path)
            if order in entries and _bytes_at(file, places["byteorder"]) != b"little":
                raise ValueError(
                    f"Expected a file in little-endian byte order, got {path} in big-endian. "
                    "Save it again on x86 or ARM."
                )
            if entries[table].file_size > pickles.MAX_BYTES:
                raise ValueError(f"{path}: Expected a data.pkl of at most {pickles.MAX_BYTES} bytes")
            data = _bytes_at(file, places["data.pkl"])
        if zlib.crc32(data) != entries[table].CRC:
            raise zipfile.BadZipFile("the checksum of data.pkl differs")
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is cut off or damaged{_where_cut(path)}: its zip archive cannot be read ({error})"
        ) from None
    tree = pickles.load_pickle(io.BytesIO(data), str(path), _call, _storage)
    return tree, {name[len("data/") :]: place for name, place in places.items() if name.startswith("data/")}


def _place(file: BinaryIO, entry: zipfile.ZipInfo, path: Path) -> tuple[int, int]:
    """The offset and size of the bytes of an entry."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: Expected entries without compression, got {entry.filename!r} compressed.")
    file.seek(min(max(entry.header_offset, 0), os.path.getsize(path)))
    header = file.read(30)  # its name and padding may differ in length from the directory's
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: {entry.filename!r} is not where its directory says")
    start = entry.header_offset + 30
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return start, entry.file_size


def _bytes_at(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(min(place[1], pickles.MAX_BYTES))


def _where_cut(path: Path) -> str:
    """` in tensor NAME` of an archive whose directory, at its end, is cut off; empty if the tensor is unknown.

    torch.save writes data.pkl first, and the name of each storage before its bytes.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, key = len(data), ""
        while not key and (at := data.rfind(b"PK\x03\x04", 0, at)) > 0:
            length = int.from_bytes(data[at + 26 : at + 28], "little")
            name = data[at + 30 : at + 30 + min(length, 256)].decode("ascii", "replace")
            key = name.partition("/data/")[2]
            if not key and "/" in name:  # something small that follows the tensors
                return ""
        length = int.from_bytes(data[26:28], "little")
        if not key or data.find(b"PK\x01\x02", at) > 0 or not data[30 : 30 + length].endswith(b"data.pkl"):
            return ""
        file.seek(30 + length + int.from_bytes(data[28:30], "little"))
        tensors: dict[str, _Tensor] = {}
        try:
            table = io.BytesIO(file.read(pickles.MAX_BYTES))
            _collect(
                path, _unwrapped(pickles.load_pickle(table, str(path), _call, _storage)), "", tensors, set()
            )
        except ValueError:
            return ""
    names = [name for name, tensor in tensors.items() if tensor.storage.key == key]
    return f" in tensor {names[0]}" if names else ""


def _read_legacy(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_read_zip`, of the format before torch 1.6."""
    size, places, storages = path.stat().st_size, {}, {}

    def persistent(identifier: Any) -> Any:
        found = _storage(identifier)
        if isinstance(found, _Storage):
            storages[found.key] = found
        return found

    with open(path, "rb") as file:
        where, table = str(path), io.BytesIO(file.read(pickles.MAX_BYTES))
        magic = pickles.load_pickle(table, where, _call, persistent)
        if magic != LEGACY_MAGIC:
            raise ValueError(f"Expected a checkpoint made by torch.save, got {path}, another pickle.")
        for _ in range(2):  # version of the protocol, and of the system
            pickles.load_pickle(table, where, _call, persistent)
        tree = pickles.load_pickle(table, where, _call, persistent)
        keys = pickles.load_pickle(table, where, _call, persistent)
        place = table.tell()
        for key in keys if isinstance(keys, list) else []:
            if not isinstance(key, str) or key not in storages:
                raise ValueError(f"{path} is damaged: a storage in its list belongs to no tensor")
            storage = storages[key]
            file.seek(place)
            held = int.from_bytes(file.read(8), "little") * storage.dtype.itemsize
            places[key] = (place + 8, min(held, max(size - place - 8, 0)))
            place += 8 + held
            if place > size:
                break
    return tree, places


def _storage(identifier: Any) -> Any:
    """The object of a persistent identifier of torch.save: a storage, or in old files a module's class."""
    match identifier:
        case ("module", Name() as name, *_):
            return name
        case ("storage", Name(name=kind), str(key), _, int(), *_) if kind in _DTYPES:
            if len(key) > 100 or not key.isprintable():
                raise ValueError(f"a storage has the key {key[:80]!r}")
            if len(identifier) > 5 and identifier[5] is not None:
                raise ValueError(f"storage {key} is a view of another, as torch before 0.4 wrote it")
            return _Storage(key, np.dtype(_DTYPES[kind]))
        case ("storage", Name() as kind, *_):
            raise ValueError(f"a storage of type {kind} is not known")
    raise ValueError(f"an identifier, a {type(identifier).__name__}, is not one of torch.save")


def _call(name: Name, args: tuple) -> Any:
    match str(name), args:
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (
            _Storage() as storage, int(offset), tuple(shape), tuple(strides), *_,
        ):  # fmt: skip
            if not len(shape) == len(strides) <= 64:
                raise ValueError(f"a tensor has shape and strides of {len(shape)} and {len(strides)} axes")
            if not all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *shape, *strides)):
                raise ValueError("a tensor has shape, strides or offset that are not numbers >= 0")
            return _Tensor(storage, offset, shape, strides)
        case (
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
            (_Tensor() as tensor, *_),
        ):
            return tensor
        case "collections.OrderedDict" | "builtins.dict", ():
            return {}
        case "collections.OrderedDict", (list(pairs),):
            return pickles.text_items({}, [item for key, value in pairs for item in (key, value)])
    return Object(name, args)


def _unwrapped(tree: Any) -> Any:
    """The state dict of a training checkpoint, or `tree` itself."""
    for key in _WRAPPERS:
        if isinstance(tree, dict) and isinstance(tree.get(key), (dict, Object)):
            return tree[key]
    return tree


def _collect(
    path: Path, tree: Any, prefix: str, found: dict[str, _Tensor], seen: set[int], depth: int = 0
) -> None:
    """Add the tensors of a tree of dicts and modules to `found`, by the names of its state dict."""
    if isinstance(tree, Object):
        tree = tree.state
    if not isinstance(tree, (dict, _Tensor)) or id(tree) in seen:
        return
    if isinstance(tree, _Tensor) or len(prefix) > 1000:
        check_tensor_name(prefix[:-1], path)
    if isinstance(tree, _Tensor):
        found[prefix[:-1]] = tree
        if len(found) > _MAX_TENSORS:
            raise ValueError(f"{path}: Expected a checkpoint of at most {_MAX_TENSORS} tensors")
        return
    seen.add(id(tree))
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"{path}: Expected tensors nested at most {_MAX_DEPTH} deep, got more at {prefix[:80]!r}."
        )
    if isinstance(tree.get("_parameters"), dict):  # the state of a torch.nn.Module
        for kind in ("_parameters", "_buffers", "_modules"):
            _collect(path, tree.get(kind), prefix, found, seen, depth + 1)
        return
    for key, value in tree.items():
        _collect(path, value, f"{prefix}{key[:1000]}.", found, seen, depth + 1)


def _lazy(path: Path, name: str, tensor: _Tensor, places: dict[str, tuple[int, int]]) -> Tensor:
    storage, item = tensor.storage, tensor.storage.dtype.itemsize
    if storage.key not in places:
        raise ValueError(
            f"{path} is cut off: the bytes of tensor {name} (storage {storage.key}) are not there"
        )
    start, held = places[storage.key]
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    wanted = 0 if 0 in tensor.shape else (last + 1) * item
    if wanted > held or start + held > os.path.getsize(path):
        raise ValueError(
            f"{path} is cut off: Expected {wanted} bytes for tensor {name} {tensor.shape}, "
            f"got {held} in storage {storage.key}."
        )
    numel = math.prod(tensor.shape)
    if numel > held // item:  # strides of 0 would make a small file an array of any size
        raise ValueError(
            f"{path}: Expected tensor {name} {tensor.shape} within its storage, "
            f"got a storage of {held // item} numbers."
        )

    def read() -> np.ndarray:
        if numel == 0:
            return np.empty(tensor.shape, storage.dtype)
        flat = np.memmap(path, storage.dtype, "r", start + tensor.offset * item, (last - tensor.offset + 1,))
        strides = tuple(s * item for s in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return Tensor(tensor.shape, storage.dtype, read)
