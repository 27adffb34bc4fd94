"""Builds a TFDS data set in array_record format out of any source, without TensorFlow and without a network.

Rows keep their order; pictures are stored as files (`image`), with `captions`, `captions_zh` and `label` as far
as the source has them.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from dalle_jax.data.images import BadImageError, encode_png
from dalle_jax.data.sources import Dataset
from dalle_jax.data.sources.dataset import StoredDataset

VERSION = "1.0.0"


def build_tfds(
    name: str,
    splits: dict[str, Dataset],
    out: str | Path,
    *,
    size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, dict[str, Counter[str]]]:
    """Writes the rows of each split to `out/name/1.0.0`.

    size: side of the stored pictures, pixels, cropped to the centre; JPEG where the source's file is one, else
        PNG. None stores the files as they are. Scenes need a size.

    Returns that directory and, for each split, the rows left out because their picture cannot be used, by
    cause. Raises ValueError if the data set is there already or if a source of scenes comes without a size.
    """
    import tensorflow_datasets as tfds

    if (there := Path(out) / name / VERSION).exists():
        raise ValueError(f"{there} is there already; choose another --out or delete it")
    if size is None and not all(isinstance(s, StoredDataset) for s in splits.values()):
        raise ValueError(
            "scenes and mixtures have no files to store; give the side of the pictures, --size 64"
        )
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; want a side of at least 1 pixel")
    left_out: dict[str, Counter[str]] = {split: Counter() for split in splits}
    total, done = sum(map(len, splits.values())), [0]
    classes = next((s.classes for s in splits.values() if s.classes), ())

    def examples(split: str, source: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(source)):
            done[0] += 1
            if progress is not None:
                progress(done[0], total)
            try:
                image = _file(source, i, size)
            except BadImageError as error:
                left_out[split][f"picture {error.cause}"] += 1
                continue
            said = source.captions(i)
            example = {
                "image": image,
                "captions": list(said.get("en", ())),
                "captions_zh": list(said.get("zh", ())),
            }
            label = source.label(i)
            yield i, example | ({"label": -1 if label is None else label} if classes else {})

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no checksums of downloads beside this file; looking would import what TFDS lacks
        url_infos: ClassVar[dict] = {}

        def _info(self):
            f = tfds.features
            features = {"image": f.Image(shape=(None, None, 3))}
            features |= {key: f.Sequence(f.Text()) for key in ("captions", "captions_zh")}
            if classes:
                features["label"] = f.ClassLabel(names=list(classes))
            return tfds.core.DatasetInfo(
                builder=self, features=f.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: examples(split, source) for split, source in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    builder = Builder(data_dir=str(out), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir), left_out


def _file(source: Dataset, i: int, size: int | None) -> bytes:
    if not isinstance(source, StoredDataset):
        return encode_png(source.image(i, size, "center"))
    data = source.stored(i)
    if size is None:
        return data if isinstance(data, bytes) else encode_png(np.ascontiguousarray(data))
    square = source.image(i, size, "center")
    if not (isinstance(data, bytes) and data[:2] == b"\xff\xd8"):
        return encode_png(square)
    out = io.BytesIO()
    Image.fromarray(square).save(out, "JPEG", quality=95)
    return out.getvalue()
