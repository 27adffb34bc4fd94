"""Safetensors files, read by the safetensors library."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dalle_jax.importers.tensors import Tensor, Tensors, check_tensor_name

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def lazy_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the table of a file.

    Returns:
      Its arrays, each copied from the file when it is read, and its metadata.

    Raises:
      ValueError: The file is cut off or not of this format, or an array overlaps another one, leaves a gap, or has a
        dtype or shape that NumPy lacks.
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
