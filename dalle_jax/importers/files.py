"""The tensors of a checkpoint, whatever its format: told by its first bytes, not by its name."""

from __future__ import annotations

import os
from pathlib import Path

from dalle_jax.importers import flax_files, safetensors, torch_files
from dalle_jax.importers.tensors import Tensors

# What a directory of a public model may hold, the safest format first.
_IN_DIRECTORIES = ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin")


def read_tensors(path: str | os.PathLike) -> Tensors:
    """Names, shapes and types of the tensors of a file, or of the one weights file of a directory; reads none.

    Torch's zip archives and older files, safetensors, and Flax's msgpack, all read without running anything.
    Raises FileNotFoundError, or ValueError saying what is wrong with the file, naming the tensor where one is.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; want a checkpoint")
    with open(path, "rb") as file:
        start = file.read(16)
    if (
        start[4:9] == b"\0\0\0\0{"
    ):  # a table of less than 4 GiB; before pickle, whose first bytes are a length too
        return safetensors.tensors(path)[0]
    if start[:4] == b"PK\x03\x04" or (len(start) > 1 and start[0] == 0x80 and start[1] in (2, 3, 4, 5)):
        return torch_files.read(path)
    if start[:2] == b"\x1f\x8b":
        raise ValueError(
            f"{path} is a gzip archive; unpack it first and give the checkpoint or directory in it"
        )
    if start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return flax_files.read(path)
    raise ValueError(
        f"{path} begins with {start[:8]!r}, which is no format that is read: torch.save, safetensors, Flax msgpack"
    )


def _in_directory(path: Path) -> Path:
    found = [path / name for name in _IN_DIRECTORIES if (path / name).is_file()]
    if not found:
        index = next((p.name for p in path.iterdir() if p.name.endswith(".index.json")), None)
        why = (
            f"it is split over several files ({index})"
            if index
            else f"want one of {', '.join(_IN_DIRECTORIES)}"
        )
        raise FileNotFoundError(f"{path} has no weights in one file: {why}; give the file itself")
    return found[0]
