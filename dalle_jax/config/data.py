"""Data of a run: sources, batches, the text vocabulary."""

from __future__ import annotations

import math
from dataclasses import field
from fractions import Fraction
from typing import Literal

from dalle_jax.config.schema import frozen_config, require, require_at_least, require_fraction

Language = Literal["en", "zh"]
SceneSize = Literal["small", "medium", "large"]
SceneFill = Literal["solid", "striped", "dotted"]
SceneBackground = Literal["plain", "gradient", "two-tone"]

MIXTURE_PERIOD = 10_000  # rows after which the pattern of the parts of a mixture repeats


@frozen_config
class ScenesSource:
    """Procedural captioned scenes, generated on demand (dalle_jax/data/scenes/generator.py)."""

    kind: Literal["scenes"] = "scenes"
    count: int = 1_000_000  # scenes in the training split
    min_objects: int = 1  # in a scene
    max_objects: int = 4  # in a scene, at most 4
    sizes: tuple[SceneSize, ...] = ("small", "medium", "large")  # of objects, sampled from these
    fills: tuple[SceneFill, ...] = ("solid", "striped", "dotted")  # of objects
    backgrounds: tuple[SceneBackground, ...] = ("plain", "gradient", "two-tone")  # of scenes
    seed: int = 0  # another seed gives other scenes

    def __post_init__(self):
        require_at_least(self, 1, "count")
        require(
            1 <= self.min_objects <= self.max_objects <= 4,
            "Expected 1 <= min_objects <= max_objects <= 4 in ScenesSource, "
            f"got {self.min_objects} and {self.max_objects}.",
        )
        require(
            bool(self.sizes and self.fills and self.backgrounds),
            "Expected one or more sizes, fills and backgrounds in ScenesSource, "
            f"got {self.sizes}, {self.fills} and {self.backgrounds}.",
        )
        require(
            self.max_objects == 1 or set(self.sizes) != {"large"},
            f"Expected ScenesSource.sizes with small or medium for two objects or more, got {self.sizes}. "
            "Add one of them.",
        )


@frozen_config
class TarSource:
    """Tar files of `NAME.(webp|png|jpg)` beside `NAME.json` or `NAME.txt`, indexed once and read by random access.

    The JSON has a list of English `captions` (or one string `caption`), optionally `captions_zh`, and a `split`. If it
    has no captions, the text has: English, one per line.
    """

    kind: Literal["tar"] = "tar"
    path: str = ""  # a tar, or several separated by commas; globs allowed
    train_split: str = "train"  # value of `split` in the JSON
    eval_split: str = "val"
    captions_field: str = "captions"
    captions_zh_field: str = "captions_zh"
    exclude: str | None = None  # file with names of records to leave out of training (docs/data.md)
    max_bad_fraction: float = 0.05  # fraction of unusable records above which reading raises an error
    min_image_size: int = 8  # shorter side, pixels; smaller images are unusable
    max_aspect_ratio: float = 16.0  # longer side over shorter; images above it are unusable

    def __post_init__(self):
        _check_limits(self)


@frozen_config
class FolderSource:
    """A folder of images with captions.jsonl, metadata.csv or .jsonl, NAME.txt or NAME.json beside each image, or
    subfolders named by class (dalle_jax/data/sources/folder.py)."""

    kind: Literal["folder"] = "folder"
    path: str = ""
    train_split: str = "train"
    eval_split: str = "val"
    eval_fraction: float = 0.05  # held out by a hash of the names, if nothing names a split
    captions_field: str = "captions"  # or `caption` or `text`
    captions_zh_field: str = "captions_zh"
    templates: tuple[str, ...] = ("{}",)  # captions of a class; {} is its name
    exclude: str | None = None  # file with names of records to leave out of training (docs/data.md)
    max_bad_fraction: float = 0.05  # fraction of unusable records above which reading raises an error
    min_image_size: int = 8  # shorter side, pixels; smaller images are unusable
    max_aspect_ratio: float = 16.0  # longer side over shorter; images above it are unusable

    def __post_init__(self):
        _check_limits(self)
        _check_templates(self)
        require_fraction(self, "eval_fraction", below_one=True)


@frozen_config
class TfdsSource:
    """A prepared TensorFlow Datasets directory in array_record or tfrecord format, with captions, labels or neither."""

    kind: Literal["tfds"] = "tfds"
    path: str = ""  # a directory, or a name such as `coco_captions/2014:1.1.0` below data_dir
    data_dir: str | None = None  # None is $TFDS_DATA_DIR, else ~/tensorflow_datasets
    train_split: str = "train"  # or a slice such as `train[5%:]`
    eval_split: str = "test"
    image_field: str = "image"
    captions_field: str = "captions"
    captions_zh_field: str = "captions_zh"
    label_field: str = "label"
    templates: tuple[str, ...] = ("a photo of a {}",)  # captions of a class; {} is its name
    exclude: str | None = None  # file with names of records to leave out of training (docs/data.md)
    max_bad_fraction: float = 0.05  # fraction of unusable records above which reading raises an error
    min_image_size: int = 8  # shorter side, pixels; smaller images are unusable
    max_aspect_ratio: float = 16.0  # longer side over shorter; images above it are unusable

    def __post_init__(self):
        _check_limits(self)
        _check_templates(self)


@frozen_config
class ArraysSource:
    """An npz file of small labeled images: `train_x`, `train_y`, `test_x`, `test_y`, `label_names`."""

    kind: Literal["arrays"] = "arrays"
    path: str = ""
    train_split: str = "train"
    eval_split: str = "test"
    exclude: str | None = None  # file with names of records to leave out of training (docs/data.md)
    templates: tuple[str, ...] = ("a photo of a {}",)  # captions of a class; {} is its name

    def __post_init__(self):
        _check_templates(self)


def _check_limits(source: TarSource | FolderSource | TfdsSource) -> None:
    require_fraction(source, "max_bad_fraction")
    require_at_least(source, 1, "min_image_size", "max_aspect_ratio")


def _check_templates(source: FolderSource | TfdsSource | ArraysSource) -> None:
    require(
        all("{}" in t for t in source.templates) and len(source.templates) > 0,
        f"Expected one or more templates with {{}} for the name of the class, got {source.templates}.",
    )


StoredSource = TarSource | FolderSource | TfdsSource | ArraysSource
PartSource = ScenesSource | StoredSource


@frozen_config
class MixtureSource:
    """Rows of several sources, mixed by weight (dalle_jax/data/sources/mixture.py)."""

    kind: Literal["mixture"] = "mixture"
    parts: tuple[PartSource, ...]
    weights: tuple[
        float, ...
    ]  # one for each part, in any unit: fractions of the rows are weights over their sum

    def __post_init__(self):
        require(len(self.parts) > 0, "Expected one or more sources in MixtureSource.parts, got none.")
        require(
            len(self.weights) == len(self.parts),
            f"Expected one weight for each of {len(self.parts)} parts in MixtureSource.weights, "
            f"got {len(self.weights)}.",
        )
        require(
            all(math.isfinite(w) and w > 0 for w in self.weights),
            f"Expected MixtureSource.weights of finite numbers above 0, got {self.weights}. "
            "Remove parts that are not used.",
        )
        for i, count in enumerate(self.counts):
            require(
                count > 0,
                f"Expected MixtureSource.weights[{i}] of at least 1 / {MIXTURE_PERIOD} of their sum, "
                f"got {self.weights[i]:g} of {math.fsum(self.weights):g}. "
                "Increase it or remove the part.",
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each part in MIXTURE_PERIOD rows, by largest remainders: within 1 of its fraction."""
        total = sum(map(Fraction, self.weights))
        exact = [Fraction(w) * MIXTURE_PERIOD / total for w in self.weights]
        counts = [math.floor(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: MIXTURE_PERIOD - sum(counts)]:
            counts[i] += 1
        return tuple(counts)


SourceConfig = PartSource | MixtureSource


@frozen_config
class DataConfig:
    """Rows of a step and how they are read."""

    source: SourceConfig = field(default_factory=ScenesSource)
    codes: str | None = (
        None  # directory of `dalle-jax encode RUN --data`: train on its codes instead of images
    )
    batch_size: int = 64  # global batch, rows per update over all devices and accumulation steps
    # none resizes without keeping the aspect ratio; random is the paper's for the tokenizer (A.2), narrow its for the
    # Transformer (B.1)
    crop: Literal["none", "center", "random", "narrow"] = "center"
    languages: tuple[Language, ...] = ("en", "zh")  # of the captions
    seed: int = 0  # of the shuffle and of the random choices of each row
    num_threads: int = 2  # that build batches ahead of the device
    # Processes that build batches instead of threads, which share Python's lock; 0 uses threads.
    num_workers: int = 0
    prefetch: int = 4  # batches built ahead

    def __post_init__(self):
        require_at_least(self, 1, "batch_size", "num_threads", "prefetch")
        require_at_least(self, 0, "num_workers", hint="Use 0 for threads.")
        require(
            len(self.languages) > 0 and len(set(self.languages)) == len(self.languages),
            f"Expected data.languages of one or more different languages out of en, zh, got {self.languages}.",
        )


@frozen_config
class TextConfig:
    """Byte-pair encoding of the captions (2102.12092, 2.2: 16,384 pieces, lower case, 10% dropout)."""

    tokenizer_path: str | None = None  # a vocabulary (docs/data.md); None trains one on the source's captions
    num_train_captions: int = 200_000  # captions that the vocabulary is trained on
    bpe_dropout: float = 0.1  # probability of skipping a merge while training
    lowercase: bool = True
    nfkc: bool = True  # map compatible forms of a character, e.g. full-width letters, to one

    def __post_init__(self):
        require_fraction(self, "bpe_dropout", below_one=True)
        require_at_least(self, 1, "num_train_captions")
