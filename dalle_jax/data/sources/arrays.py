"""Rows of one npz file of small images, held in memory.

Arrays: `train_x` uint8 (N, H, W, 3) or (N, H, W), `train_y` integers (N,), `test_x`, `test_y` and optionally
`label_names`; or `x_train`, `y_train` and so on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dalle_jax import config
from dalle_jax.data.sources.captions import class_captions
from dalle_jax.data.sources.dataset import Captions, Split
from dalle_jax.data.sources.stored import StoredDataset
from dalle_jax.files.archives import list_npz, read_npz


class ArrayDataset(StoredDataset):
    """The images of one split; the templates make captions of the labels."""

    def __init__(self, source: config.ArraysSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        super().__init__(0.0, languages)
        self._config = source
        self._split = name = source.train_split if split == "train" else source.eval_split
        path, hint = os.path.expanduser(source.path), "Set data.source.path to an npz file."
        names = list_npz(path, hint)
        x = next((k for k in (f"{name}_x", f"x_{name}") if k in names), None)
        y = next((k for k in (f"{name}_y", f"y_{name}") if k in names), None)
        if x is None:
            raise ValueError(
                f"Expected an array {name}_x or x_{name} in {source.path}, got {', '.join(names)}. {hint}"
            )
        arrays = read_npz(path, hint, [x, "label_names", *([] if y is None else [y])])
        self._images = arrays[x]
        self._check_images(x)
        self._labels = None if y is None else arrays[y].reshape(-1)
        if self._labels is not None:
            self._set_classes(self._labels, [str(n) for n in arrays.get("label_names", ())])
        elif self._languages:
            raise ValueError(
                f"Expected labels in {source.path} to make captions of, got none. Train an unconditional model on it."
            )
        self._set_num_rows(len(self._images))

    def _check_images(self, name: str) -> None:
        dtype, shape = self._images.dtype, self._images.shape
        channels = shape[3] if len(shape) == 4 else 1
        if dtype != np.uint8 or len(shape) not in (3, 4) or channels not in (1, 3):
            raise ValueError(
                f"Expected uint8 (rows, height, width, 3) in {name} of {self._config.path}, got {dtype} {shape}."
            )

    def _set_classes(self, labels: np.ndarray, names: list[str]) -> None:
        path = self._config.path
        if len(labels) != len(self._images) or labels.min(initial=0) < 0:
            raise ValueError(
                f"Expected one label of 0 or more for each of the {len(self._images)} images of {path}, "
                f"got {len(labels)} labels."
            )
        self.classes = tuple(names or map(str, range(int(labels.max()) + 1)))
        if labels.max() >= len(self.classes):
            raise ValueError(
                f"Expected labels below the {len(names)} label_names of {path}, got {labels.max()}."
            )

    def _read_image(self, row: int) -> np.ndarray:
        image = self._images[row]
        image = image[..., None] if image.ndim == 2 else image
        return np.broadcast_to(image, (*image.shape[:2], 3))

    def _read_captions(self, row: int) -> Captions:
        if self._labels is None:
            return {}
        return class_captions(self.classes[self._labels[row]], self._config.templates, self._languages)

    def _read_label(self, row: int) -> int | None:
        return None if self._labels is None else int(self._labels[row])

    def _row_name(self, row: int) -> str:
        return f"row {row}"

    def _source_name(self) -> str:
        return self._config.path

    def _fingerprint_fields(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._images[:: max(1, len(self) // 100)].tobytes()).hexdigest()[:16]
        return {"kind": "arrays", "split": self._split, "rows": len(self), "digest": digest}
