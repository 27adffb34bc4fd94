"""Data of a run: sources, batches, the text vocabulary."""

from __future__ import annotations

import math
from dataclasses import field
from fractions import Fraction
from typing import Literal

from dalle_jax.config.schema import frozen_config, require

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
        require(self.count >= 1, f"ScenesSource.count is {self.count}; want at least 1")
        require(
            1 <= self.min_objects <= self.max_objects <= 4,
            f"objects per scene {self.min_objects}..{self.max_objects}; want 1 <= min <= max <= 4",
        )
        require(
            len(self.fills) * len(self.sizes) * len(self.backgrounds) > 0
            and (self.max_objects == 1 or set(self.sizes) != {"large"}),
            f"scenes of sizes {self.sizes}, fills {self.fills}, backgrounds {self.backgrounds}; want at least one "
            "of each, and not only large ones where a scene holds two objects or more",
        )


@frozen_config
class TarSource:
    """Tar files of `NAME.(webp|png|jpg)` beside `NAME.json` or `NAME.txt`, indexed once and read by random access.

    The JSON has a list of English `captions` (or one string `caption`), optionally `captions_zh`, and a `split`. If it has
    no captions, the text has: English, one per line.
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
        require(
            0 <= self.eval_fraction < 1, f"eval_fraction is {self.eval_fraction}; want a fraction in [0, 1)"
        )


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
    fraction, side, aspect = source.max_bad_fraction, source.min_image_size, source.max_aspect_ratio
    require(0 <= fraction <= 1, f"max_bad_fraction is {fraction}; want a fraction in [0, 1]")
    require(
        side >= 1 and aspect >= 1,
        f"min_image_size is {side}, max_aspect_ratio {aspect}; want at least 1 each",
    )


def _check_templates(source: FolderSource | TfdsSource | ArraysSource) -> None:
    require(
        all("{}" in t for t in source.templates) and len(source.templates) > 0,
        f"templates are {source.templates}; want at least one, each with {{}} where the class name goes",
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
        require(len(self.parts) > 0, "MixtureSource.parts is empty; want one source or more")
        require(
            len(self.weights) == len(self.parts),
            f"MixtureSource has {len(self.parts)} parts and {len(self.weights)} weights; want one weight each",
        )
        require(
            all(math.isfinite(w) and w > 0 for w in self.weights),
            f"MixtureSource.weights are {self.weights}; want finite numbers above 0, and no part that is not used",
        )
        for i, count in enumerate(self.counts):
            require(
                count > 0,
                f"MixtureSource.weights[{i}] is {self.weights[i]:g} of {math.fsum(self.weights):g}, less than a row "
                f"in {MIXTURE_PERIOD}; raise it, or leave the part out",
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
        require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}; want at least 1")
        require(self.num_threads >= 1, f"data.num_threads is {self.num_threads}; want at least 1")
        require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; want 0 (threads) or more")
        require(self.prefetch >= 1, f"data.prefetch is {self.prefetch}; want at least 1")
        require(
            len(self.languages) > 0 and len(set(self.languages)) == len(self.languages),
            f"data.languages is {self.languages}; want one or more different languages out of en, zh",
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
        require(
            0.0 <= self.bpe_dropout < 1.0,
            f"text.bpe_dropout is {self.bpe_dropout}; want a probability in [0, 1)",
        )
        require(
            self.num_train_captions >= 1,
            f"text.num_train_captions is {self.num_train_captions}; want at least 1",
        )
