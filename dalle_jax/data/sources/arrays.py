"""Rows of one npz file of small pictures: `train_x` uint8 (N, H, W, 3) or (N, H, W), `train_y` integers (N,),
`test_x`, `test_y`, and optionally `label_names`; or `x_train`, `y_train` and so on. Held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dalle_jax import config
from dalle_jax.data.sources.dataset import Captions, Split, StoredDataset, class_captions, expand_path
from dalle_jax.files.archives import list_npz, read_npz


class ArrayDataset(StoredDataset):
    """The pictures of one split; a label becomes a caption by the templates."""

    def __init__(self, source: config.ArraysSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        super().__init__(0.0, languages)
        self._config = source
        self._split = name = source.train_split if split == "train" else source.eval_split
        path, hint = expand_path(source.path), "set data.source.path to an npz file"
        arrays = list_npz(path, hint)
        x = next((k for k in (f"{name}_x", f"x_{name}") if k in arrays), None)
        y = next((k for k in (f"{name}_y", f"y_{name}") if k in arrays), None)
        if x is None:
            raise ValueError(
                f"{source.path} has no array {name}_x or x_{name}, it has {', '.join(arrays)}; {hint}"
            )
        found = read_npz(path, hint, (x, y, "label_names"))
        self._images = found[x]
        labels = None if y is None else found[y].reshape(-1)
        names = [str(n) for n in found.get("label_names", ())]
        shape = self._images.shape
        if (
            self._images.dtype != np.uint8
            or len(shape) not in (3, 4)
            or (len(shape) == 4 and shape[3] not in (1, 3))
        ):
            raise ValueError(
                f"{source.path}: {x} is {self._images.dtype} {shape}; want uint8 (rows, height, width, 3)"
            )
        self._labels = labels
        if labels is not None:
            if len(labels) != len(self._images) or labels.min(initial=0) < 0:
                raise ValueError(
                    f"{source.path}: {len(labels)} labels for {len(self._images)} pictures, want one each"
                )
            self.classes = tuple(names or map(str, range(int(labels.max()) + 1)))
            if labels.max() >= len(self.classes):
                raise ValueError(f"{source.path}: label {labels.max()}, but {len(names)} label_names")
        elif self._languages:
            raise ValueError(
                f"{source.path} has no labels to make captions of; an unconditional model needs none"
            )
        self._found(len(self._images))

    def _picture(self, row: int) -> np.ndarray:
        image = self._images[row]
        image = image[..., None] if image.ndim == 2 else image
        return np.broadcast_to(image, (*image.shape[:2], 3))

    def _said(self, row: int) -> Captions:
        if self._labels is None:
            return {}
        return class_captions(self.classes[self._labels[row]], self._config.templates, self._languages)

    def _label_of(self, row: int) -> int | None:
        return None if self._labels is None else int(self._labels[row])

    def _name_of(self, row: int) -> str:
        return f"row {row}"

    def _name(self) -> str:
        return self._config.path

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._images[:: max(1, len(self) // 100)].tobytes()).hexdigest()[:16]
        return {"kind": "arrays", "split": self._split, "rows": len(self), "digest": digest}
