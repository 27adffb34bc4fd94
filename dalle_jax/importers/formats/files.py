"""The tensors of a checkpoint in any format, which its first bytes identify, not its name."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dalle_jax.importers.formats import flax_files, safetensors, torch_files
from dalle_jax.importers.tensors import Tensors

# The files of a public model's directory, the safest format first; with _INDEX, the list of its parts.
_IN_DIRECTORIES = ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin")
_INDEX = ".index.json"


def read_tensor_files(path: str | os.PathLike) -> Tensors:
    """Open the tensors of a file, or of a model's directory; no array is read and no code in a file is executed.

    Args:
      path: A file of torch.save, safetensors or Flax msgpack; a Hugging Face `*.index.json` with the parts that it
        names beside it; or a directory with one of these.

    Returns:
      The tensors by name.

    Raises:
      FileNotFoundError: The file or a part is missing.
      ValueError: The file is of no such format, damaged or too large; the message names the tensor if there is one.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint, got no file {path}.")
    return _read_parts(path) if path.name.endswith(_INDEX) else _read_file(path)


def _read_file(path: Path) -> Tensors:
    with open(path, "rb") as file:
        start = file.read(16)
    if (
        start[4:9] == b"\0\0\0\0{"
    ):  # a header of less than 4 GiB; before pickle, because its length may look like one
        return safetensors.lazy_safetensors(path)[0]
    if start[:4] == b"PK\x03\x04" or (len(start) > 1 and start[0] == 0x80 and start[1] in (2, 3, 4, 5)):
        return torch_files.read_torch(path)
    if start[:2] == b"\x1f\x8b":
        raise ValueError(
            f"Expected a checkpoint, got the gzip archive {path}. "
            "Unpack it and use the checkpoint or directory in it."
        )
    if start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return flax_files.read_flax(path)
    raise ValueError(
        f"Expected a file of torch.save, safetensors or Flax msgpack, got {path}, which begins with {start[:8]!r}."
    )


def _in_directory(path: Path) -> Path:
    names = [*_IN_DIRECTORIES, *(name + _INDEX for name in _IN_DIRECTORIES)]
    files = [path / name for name in names if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"Expected one of {', '.join(_IN_DIRECTORIES)}, or their {_INDEX} and its parts, in {path}, got none. "
            "Use the path of the file."
        )
    return files[0]


def _read_parts(index: Path) -> Tensors:
    """Open the files that an index names, beside it.

    The index's list of tensors is not used: indices of converted files list tied tensors that no file has. The family
    checks that all tensors exist.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"Expected JSON with a weight_map of names in {index}, got other text.") from None
    tensors: Tensors = {}
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or Path(name).name != name or not name:
            raise ValueError(f"Expected the parts of {index} beside it, got {str(name)[:80]!r}.")
        file = index.parent / name
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected every part of {index.name}, got no file {file}. Copy it there too."
            )
        part = _read_file(file)
        if twice := tensors.keys() & part.keys():
            raise ValueError(
                f"Expected each tensor in one part of {index.name}, got {min(twice)} also in {file}."
            )
        tensors |= part
    return tensors
