"""Building a TFDS data set in array_record format from any source, without TensorFlow and without a network.

Rows keep their order. Images are stored as files (`image`), with `captions`, `captions_zh` and `label` as far as the
source has them.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from dalle_jax.data.images import BadImageError, encode_png
from dalle_jax.data.sources import Dataset, StoredDataset

_VERSION = "1.0.0"
_JPEG_MAGIC = b"\xff\xd8"


def build_tfds(
    name: str,
    splits: Mapping[str, Dataset],
    out: str | Path,
    *,
    size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, dict[str, Counter[str]]]:
    """Write the rows of each split to `out/name/1.0.0`.

    Args:
      name: Name of the data set.
      splits: Split -> source.
      out: Directory of data sets.
      size: Side of the stored images, pixels, cropped to the center; JPEG if the source's file is one, else PNG. None
        stores the files unchanged; scenes and mixtures need a size.
      progress: Called with the number of rows done and of all.

    Returns:
      The directory of the data set, and for each split the number of rows that were left out, by cause.

    Raises:
      ValueError: The data set exists, or a source without files comes without a size.
    """
    import tensorflow_datasets as tfds

    if (directory := Path(out) / name / _VERSION).exists():
        raise ValueError(f"{directory} exists. Choose another --out or delete it.")
    if size is None and not all(isinstance(s, StoredDataset) for s in splits.values()):
        raise ValueError(
            "Scenes and mixtures have no files to store. Set the side of the images, e.g. --size 64."
        )
    if size is not None and size < 1:
        raise ValueError(f"Expected a size of at least 1 pixel, got {size}.")
    left_out: dict[str, Counter[str]] = {split: Counter() for split in splits}
    total, done = sum(map(len, splits.values())), [0]
    classes = next((s.classes for s in splits.values() if s.classes), ())

    def examples(split: str, source: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(source)):
            done[0] += 1
            if progress is not None:
                progress(done[0], total)
            try:
                image = _image_file(source, i, size)
            except BadImageError as error:
                left_out[split][error.cause] += 1
                continue
            captions = source.captions(i)
            example: dict[str, Any] = {
                "image": image,
                "captions": list(captions.get("en", ())),
                "captions_zh": list(captions.get("zh", ())),
            }
            if classes:
                label = source.label(i)
                example["label"] = -1 if label is None else label
            yield i, example

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(_VERSION)
        code_path = None  # no checksums of downloads beside this file; searching them would import TensorFlow
        url_infos: ClassVar[dict] = {}

        def _info(self):
            f = tfds.features
            features: dict[str, Any] = {"image": f.Image(shape=(None, None, 3))}
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


def _image_file(source: Dataset, i: int, size: int | None) -> bytes:
    """Return the image of row i as a file. Raises BadImageError."""
    data = source.stored_image(i) if isinstance(source, StoredDataset) else b""
    if size is None:
        return data if isinstance(data, bytes) else encode_png(np.ascontiguousarray(data))
    square = source.image(i, size, "center")
    if not (isinstance(data, bytes) and data.startswith(_JPEG_MAGIC)):
        return encode_png(square)
    out = io.BytesIO()
    Image.fromarray(square).save(out, "JPEG", quality=95)
    return out.getvalue()
