"""The FID Inception-v3 of 2015 in the file of pytorch-fid and torch-fidelity, `pt_inception-2015-12-05-6726825d.pth`.

The file has torchvision's module names, a scale in each batch norm (all ones, as trained) and the classifier `fc` of
1,008 classes; `evaluate/inception.py` reads the names of the original graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from dalle_jax.importers.formats.files import read_tensor_files

PREFIX = "net.layers."
CLASSIFIER = f"{PREFIX}output.weight"
CLASSES = 1008

_STEM = {
    "Conv2d_1a_3x3": "conv", "Conv2d_2a_3x3": "conv_1", "Conv2d_2b_3x3": "conv_2", "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
}  # fmt: skip


def _chain(theirs: str, ours: str, first: int, last: int) -> dict[str, str]:
    """Map `theirs`_first to `theirs`_last to `ours`.conv, `ours`.conv_1, ..."""
    return {
        f"{theirs}_{i}": f"{ours}.conv" + (f"_{i - first}" if i > first else "")
        for i in range(first, last + 1)
    }


_POOL = {"branch_pool": "tower_2.conv"}
_BLOCK_35 = {
    "branch1x1": "conv",
    **_chain("branch5x5", "tower", 1, 2),
    **_chain("branch3x3dbl", "tower_1", 1, 3),
}
_BLOCK_17 = {
    "branch1x1": "conv",
    **_chain("branch7x7", "tower", 1, 3),
    **_chain("branch7x7dbl", "tower_1", 1, 5),
}
_BLOCK_8 = {
    "branch1x1": "conv", "branch_pool": "tower_2_conv",
    "branch3x3_1": "tower_conv", "branch3x3_2a": "tower_mixed_conv", "branch3x3_2b": "tower_mixed_conv_1",
    "branch3x3dbl_1": "tower_1_conv", "branch3x3dbl_2": "tower_1_conv_1",
    "branch3x3dbl_3a": "tower_1_mixed_conv", "branch3x3dbl_3b": "tower_1_mixed_conv_1",
}  # fmt: skip
_BLOCKS = {
    **{f"Mixed_5{x}": _BLOCK_35 | _POOL for x in "bcd"},
    "Mixed_6a": {"branch3x3": "conv", **_chain("branch3x3dbl", "tower", 1, 3)},
    **{f"Mixed_6{x}": _BLOCK_17 | _POOL for x in "bcde"},
    "Mixed_7a": {**_chain("branch3x3", "tower", 1, 2), **_chain("branch7x7x3", "tower_1", 1, 4)},
    **{f"Mixed_7{x}": _BLOCK_8 for x in "bc"},
}
_PARTS = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}


def inception_convolutions() -> Iterator[tuple[str, str]]:
    """Yield the name in the file and in the graph of every convolution with its batch norm."""
    yield from _STEM.items()
    for number, (block, inside) in enumerate(_BLOCKS.items()):
        mixed = "mixed" + (f"_{number}" if number else "")
        yield from ((f"{block}.{theirs}", f"{mixed}.{ours}") for theirs, ours in inside.items())


def read_inception(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the tensors by their names in the graph, scales of batch norms folded into kernels and means.

    Returns:
      The arrays, among them `CLASSIFIER`.

    Raises:
      ValueError: It names a tensor that is missing or unknown.
    """
    tensors = read_tensor_files(path)
    unread = {name for name in tensors if not name.endswith("num_batches_tracked") and name != "fc.bias"}
    arrays = {}

    def take(name: str) -> np.ndarray:
        if name not in tensors:
            raise ValueError(
                f"Expected the weights of the FID Inception-v3, got {path} without {name}. "
                "Use the file of pytorch-fid or torch-fidelity, "
                "pt_inception-2015-12-05-6726825d.pth."
            )
        unread.discard(name)
        return tensors[name].read()

    for theirs, ours in inception_convolutions():
        part = {end: take(f"{theirs}.{name}") for name, end in _PARTS.items()}
        scale = take(f"{theirs}.bn.weight")
        part["weight"] = part["weight"] * scale.reshape(-1, 1, 1, 1)
        part["mean"] = part["mean"] * scale
        arrays.update({f"{PREFIX}{ours}.{end}": tensor for end, tensor in part.items()})
    arrays[CLASSIFIER] = take("fc.weight")
    if unread:
        raise ValueError(
            f"Expected only the weights of the FID Inception-v3, got {path} with {', '.join(sorted(unread)[:3])}."
        )
    return arrays
