"""The parameters of one model as a safetensors file, `model.safetensors`.

A safetensors file is a JSON table of names, dtypes, shapes and byte ranges, followed by the bytes of the arrays. The
safetensors library reads it, but writes only arrays that are all in memory; the writer here streams them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dalle_jax.config import ModelConfig
from dalle_jax.files.atomic import atomic_path
from dalle_jax.importers.formats.safetensors import lazy_safetensors
from dalle_jax.importers.tensors import LazyParam
from dalle_jax.models.registry import model_shapes
from dalle_jax.parallel.sharding import path_name
from dalle_jax.typing import Params

_DTYPE_NAMES = {
    np.dtype(dtype): name
    for name, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
        "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip


def write_params(
    path: Path, params: Params, step: int = 0, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Write parameters atomically, one array (of a `LazyParam`: one chunk) in memory at a time.

    Args:
      path: The file.
      params: Nested dicts of arrays or `LazyParam`s. The keys of an array are joined by dots.
      step: The training step of the parameters.
      on_progress: Called after each array with the number of parameters written so far and the total.

    Returns:
      The number of parameters.

    Raises:
      OSError: The file cannot be written.
    """
    leaves = _by_name(params)
    total, done, end = sum(math.prod(leaf.shape) for leaf in leaves.values()), 0, 0
    table: dict[str, Any] = {"__metadata__": {"format": "dalle_jax", "step": str(step)}}
    for name, leaf in leaves.items():
        start, end = end, end + math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        table[name] = {
            "dtype": _DTYPE_NAMES[np.dtype(leaf.dtype)], "shape": list(leaf.shape), "data_offsets": [start, end],
        }  # fmt: skip
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)  # arrays begin at a multiple of 8
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, leaf in leaves.items():
            for chunk in _chunks(leaf):
                assert chunk.dtype == leaf.dtype
                file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
            assert file.tell() == 8 + len(header) + table[name]["data_offsets"][1]
            done += math.prod(leaf.shape)
            if on_progress:
                on_progress(done, total)
    return total


def read_params(path: Path, model: ModelConfig) -> tuple[Params, int]:
    """Read the parameters of `model` and their training step.

    Raises:
      ValueError: It names the array that is missing, unknown, of another shape or dtype, or not finite.
    """
    tensors, metadata = lazy_safetensors(path)
    shapes = model_shapes(model)
    expected = _by_name(shapes)
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            problem = f"no {name}" if name in expected else f"also {name}"
            raise ValueError(
                f"Expected the arrays of a {model.kind} of this configuration in {path}, got {problem}."
            )
    arrays = []
    for name, leaf in expected.items():
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{path}: Expected array {name} to be {leaf.dtype} {leaf.shape} by config.json, "
                f"got {tensor.dtype} {tensor.shape}"
            )
        arrays.append(tensor.read())
        if not np.isfinite(arrays[-1]).all():
            raise ValueError(f"{path}: Expected finite values in array {name}, got others.")
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays), _step_of(metadata)


def read_params_step(path: Path) -> int:
    """Read the training step of the parameters in a file; no array is read.

    Raises:
      ValueError: The file is not a whole safetensors file.
    """
    return _step_of(lazy_safetensors(path)[1])


def _step_of(metadata: dict[str, str]) -> int:
    """The training step that `write_params` recorded; 0 if there is none."""
    step = metadata.get("step", "0")
    return int(step) if step.isdigit() else 0


def params_fingerprint(model: ModelConfig, params: Params) -> str:
    """Return 16 hexadecimal digits that change with any parameter; codes record the image tokenizer by it.

    The configuration is left out: its sizes show in the shapes of the parameters, and a field that a later version
    adds would separate a tokenizer from its codes.
    """
    digest = hashlib.sha256(model.kind.encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path_name(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _by_name(params: Params) -> dict[str, Any]:
    """The leaves of nested dicts, their keys joined by dots, in the order of `jax.tree.leaves`."""
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    return {path_name(path).replace("/", "."): leaf for path, leaf in pairs}


def _chunks(leaf: Any) -> Iterable[np.ndarray]:
    return leaf.chunks() if isinstance(leaf, LazyParam) else [np.asarray(jax.device_get(leaf))]
