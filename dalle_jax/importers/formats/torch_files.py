"""Files of torch.save: zip archives, the older stream of pickles, TorchScript archives; no torch, nothing is run.

A zip archive holds `NAME/data.pkl`, a pickle in which each tensor is a view of a storage, and `NAME/data/KEY`, the
bytes of each storage, stored as they are, so that they are mapped. The older format is a magic number, three pickles,
the list of storages, and their bytes one after another. Modules saved whole give the tensors of their tree by the
names that their state dict has.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dalle_jax.importers.formats import pickles
from dalle_jax.importers.formats.pickles import Name, Object
from dalle_jax.importers.tensors import Tensor, Tensors

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_WRAPPERS = ("state_dict", "model", "module")  # keys under which trainers put a state dict
_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_MAX_PICKLE = 1 << 30  # bytes of data.pkl


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


def read_torch(path: Path) -> Tensors:
    """The tensors of a state dict or of a whole module, by name, none of them read yet.

    A state dict under `state_dict`, `model` or `module` is taken out. Raises ValueError for a file that is cut off
    or not of this format, naming the tensor whose bytes are not all there.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    tree, places = _read_zip(path) if zipped else _read_legacy(path)
    found: dict[str, _Tensor] = {}
    _collect(_unwrapped(tree), "", found, set())
    if not found:
        raise ValueError(f"{path} holds no tensors; want a checkpoint of a model")
    return {name: _lazy(path, name, tensor, places) for name, tensor in found.items()}


def _read_zip(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The tree, and where the bytes of each storage begin and how many they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            roots = [n[: -len("data.pkl")] for n in entries if n.count("/") <= 1 and n.endswith("data.pkl")]
            if len(roots) != 1:
                raise ValueError(f"{path} is a zip file without one data.pkl; want one made by torch.save")
            root = roots[0]
            order = root + "byteorder"
            if order in entries and archive.read(order) != b"little":
                raise ValueError(f"{path} was written in big-endian byte order; save it again on x86 or ARM")
            if entries[root + "data.pkl"].file_size > _MAX_PICKLE:
                raise ValueError(f"{path}: data.pkl is too large for a table of tensors")
            table = archive.read(root + "data.pkl")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path} is cut off or damaged{_where_cut(path)}: its zip archive cannot be read ({error})"
        ) from None
    tree = pickles.load_pickle(io.BytesIO(table), str(path), _call, _storage)
    places = {}
    with open(path, "rb") as file:
        for name, entry in entries.items():
            if not name.startswith(root + "data/"):
                continue
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: {name} is compressed; torch.save stores tensors as they are")
            file.seek(entry.header_offset)
            header = file.read(30)  # its name and padding may differ in length from the table's at the end
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise ValueError(f"{path} is damaged: {name} is not where its table says")
            start = entry.header_offset + 30
            start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            places[name[len(root + "data/") :]] = (start, entry.file_size)
    return tree, places


def _where_cut(path: Path) -> str:
    """` in tensor NAME`, of an archive without its table, which stands at the end; empty where it cannot be told.

    torch.save writes data.pkl first, and the name of each storage before its bytes.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, key = len(data), ""
        while not key and (at := data.rfind(b"PK\x03\x04", 0, at)) > 0:
            length = int.from_bytes(data[at + 26 : at + 28], "little")
            name = data[at + 30 : at + 30 + length].decode("ascii", "replace")
            key = name.partition("/data/")[2]
            if not key and "/" in name:  # something small that follows the tensors
                return ""
        length = int.from_bytes(data[26:28], "little")
        if not key or data.find(b"PK\x01\x02", at) > 0 or not data[30 : 30 + length].endswith(b"data.pkl"):
            return ""
        file.seek(30 + length + int.from_bytes(data[28:30], "little"))
        tensors: dict[str, _Tensor] = {}
        try:
            _collect(_unwrapped(pickles.load_pickle(file, str(path), _call, _storage)), "", tensors, set())
        except ValueError:
            return ""
    names = [name for name, tensor in tensors.items() if tensor.storage.key == key]
    return f" in tensor {names[0]}" if names else ""


def _read_legacy(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same of the format before torch 1.6."""
    size, places, storages = path.stat().st_size, {}, {}

    def persistent(identifier: Any) -> Any:
        found = _storage(identifier)
        if isinstance(found, _Storage):
            storages[found.key] = found
        return found

    with open(path, "rb") as file:
        where = str(path)
        magic = pickles.load_pickle(file, where, _call, persistent)
        if magic != LEGACY_MAGIC:
            raise ValueError(f"{path} is a pickle but not one of torch.save; want a checkpoint of a model")
        for _ in range(2):  # version of the protocol, and of the system
            pickles.load_pickle(file, where, _call, persistent)
        tree = pickles.load_pickle(file, where, _call, persistent)
        keys = pickles.load_pickle(file, where, _call, persistent)
        place = file.tell()
        for key in keys if isinstance(keys, list) else []:
            if key not in storages:
                raise ValueError(f"{path} is damaged: storage {key!r} belongs to no tensor")
            storage = storages[key]
            file.seek(place)
            held = int.from_bytes(file.read(8), "little") * storage.dtype.itemsize
            places[key] = (place + 8, min(held, max(size - place - 8, 0)))
            place += 8 + held
    return tree, places


def _storage(identifier: Any) -> Any:
    """What stands for an identifier of torch.save: a storage, or in old files a module's class."""
    match identifier:
        case ("module", Name() as name, *_):
            return name
        case ("storage", Name(name=kind), str(key), _, int(numel), *more) if kind in _DTYPES and numel >= 0:
            if any(view is not None for view in more):
                raise ValueError(f"storage {key} is a view of another, as torch before 0.4 wrote it")
            return _Storage(key, np.dtype(_DTYPES[kind]), numel)
        case ("storage", kind, *_):
            raise ValueError(f"a storage of type {kind} is not known")
    raise ValueError(f"identifier {identifier!r} is not one of torch.save")


def _call(name: Name, args: tuple) -> Any:
    match str(name), args:
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (
            _Storage() as storage, int(offset), tuple(shape), tuple(strides), *_,
        ):  # fmt: skip
            numbers = (offset, *shape, *strides)
            if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
                raise ValueError(f"a tensor has shape {shape}, strides {strides}, offset {offset}")
            return _Tensor(storage, offset, shape, strides)
        case (
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
            (_Tensor() as tensor, *_),
        ):
            return tensor
        case "collections.OrderedDict" | "builtins.dict", ():
            return {}
        case "collections.OrderedDict", (list(pairs),):
            return {key: value for key, value in pairs}
    return Object(name, args)


def _unwrapped(tree: Any) -> Any:
    """The state dict that a trainer saved beside other things, or `tree` itself."""
    for key in _WRAPPERS:
        if isinstance(tree, dict) and isinstance(tree.get(key), (dict, Object)):
            return tree[key]
    return tree


def _collect(tree: Any, prefix: str, found: dict[str, _Tensor], seen: set[int]) -> None:
    """Adds the tensors of a tree of dicts and modules, by the names of its state dict."""
    if isinstance(tree, _Tensor):
        found[prefix[:-1]] = tree
        return
    if isinstance(tree, Object):
        tree = tree.state
    if not isinstance(tree, dict) or id(tree) in seen:
        return
    seen.add(id(tree))
    if prefix.count(".") > 64:
        raise ValueError(f"tensors are nested more than 64 deep, at {prefix[:200]}")
    if isinstance(tree.get("_parameters"), dict):  # what torch.nn.Module keeps of itself
        for kind in ("_parameters", "_buffers", "_modules"):
            _collect(tree.get(kind), prefix, found, seen)
        return
    for key, value in tree.items():
        if isinstance(key, str):
            _collect(value, f"{prefix}{key}.", found, seen)


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
            f"{path} is cut off: tensor {name} {tensor.shape} wants {wanted} bytes, of which "
            f"storage {storage.key} has {held}"
        )
    numel = math.prod(tensor.shape)
    if numel > held // item:  # strides of 0 would make a small file an array of any size
        raise ValueError(
            f"{path}: tensor {name} {tensor.shape} is larger than its storage of {held // item} numbers"
        )

    def read() -> np.ndarray:
        if numel == 0:
            return np.empty(tensor.shape, storage.dtype)
        flat = np.memmap(path, storage.dtype, "r", start + tensor.offset * item, (last - tensor.offset + 1,))
        strides = tuple(s * item for s in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return Tensor(tensor.shape, storage.dtype, read)
