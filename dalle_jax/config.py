"""Every configuration of the library: frozen, keyword-only, hashable, checked when made.

A configuration is plain data: numbers, strings, Literals and other configurations. `to_json` writes one,
`from_json` reads it back and refuses what it does not know. Anything that follows from other fields is a
property, so two fields can never disagree. Numbers of the paper carry their section (Ramesh et al. 2021,
arXiv 2102.12092).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Union

Dtype = Literal["float32", "bfloat16"]
AttentionKind = Literal["full", "row", "column", "conv"]
Language = Literal["en", "zh"]
SceneSize = Literal["small", "medium", "large"]
SceneFill = Literal["solid", "striped", "dotted"]
SceneBackground = Literal["plain", "gradient", "two-tone"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Half-cosine from `start` to `end` over `steps` updates, constant afterwards (2102.12092, A.2)."""

    start: float
    end: float
    steps: int  # updates; 0 means `end` from the beginning

    def __post_init__(self):
        _require(self.steps >= 0, f"Schedule.steps is {self.steps}; want 0 or more updates")


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Discrete VAE: sizes of the network and the schedules of its loss (2102.12092, 2.1 and A)."""

    kind: Literal["dvae"] = "dvae"
    image_size: int = 256  # side of the square picture, pixels
    groups: int = 4  # resolutions; pictures shrink by 2 between them, 2**(groups-1) in all
    blocks: int = 2  # residual blocks per group
    width: int = 256  # channels at full resolution; doubled at each group
    decoder_width: int = 128  # channels right after the codebook
    vocab: int = 8192  # codes; A.1
    tau: Schedule = Schedule(start=1.0, end=1 / 16, steps=150_000)  # Gumbel temperature; A.2
    kl_weight: Schedule = Schedule(start=0.0, end=6.6, steps=5_000)  # beta; A.2
    balance_weight: Schedule = Schedule(start=0.0, end=0.0, steps=0)  # of the KL divergence of a batch's mean
    # code distribution from uniform; keeps the codebook alive in short trainings; not in the paper
    min_scale: float = (
        0.0  # least scale b of the logit-Laplace density; above 0, flat pictures do not spend the
    )
    # likelihood on fractions of a grey level while their edges stay soft; 0 in the paper
    dtype: Dtype = "float32"  # of the convolutions; logits, softmax and loss stay float32

    def __post_init__(self):
        for name in ("image_size", "groups", "blocks", "width", "decoder_width", "vocab"):
            _require(getattr(self, name) >= 1, f"DVAEConfig.{name} is {getattr(self, name)}; want at least 1")
        _require(
            self.image_size % self.downsample == 0,
            f"image_size {self.image_size} is not divisible by {self.downsample} (= 2**(groups-1) with "
            f"groups={self.groups}); change image_size or groups",
        )
        _require(self.width % 4 == 0, f"DVAEConfig.width is {self.width}; want a multiple of 4 (bottleneck)")
        _require(self.min_scale >= 0, f"DVAEConfig.min_scale is {self.min_scale}; want 0 (none) or more")
        for s in (self.tau.start, self.tau.end):
            _require(s > 0, f"DVAEConfig.tau must stay positive, got {self.tau}")

    @property
    def downsample(self) -> int:
        return 2 ** (self.groups - 1)

    @property
    def grid(self) -> int:
        """Side of the square of codes."""
        return self.image_size // self.downsample

    @property
    def num_codes(self) -> int:
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class DalleConfig:
    """The autoregressive Transformer over text and image tokens (2102.12092, 2.2 and B)."""

    kind: Literal["dalle"] = "dalle"
    text_vocab: int = 16_384  # BPE pieces, without the padding tokens
    text_len: int = 256  # text positions; a caption that is shorter is padded
    image_vocab: int = 8192  # the tokenizer's codes
    grid: int = 32  # image tokens form a grid x grid raster
    dim: int = 3968
    layers: int = 64
    heads: int = 62
    mlp_ratio: int = 4
    attention: tuple[AttentionKind, ...] = ("row", "column", "row", "row")  # cycled over the layers; B.1
    last_attention: AttentionKind | None = "conv"  # kind of the last layer; None continues the cycle; B.1
    conv_kernel: int = 11  # side of the conv mask's window, odd; B.1
    qk_norm: bool = False  # RMS-normalise queries and keys per head; not in the paper, allows larger steps
    text_loss_weight: float = 1 / 8  # of the text cross-entropy; the image has the rest; 2.2
    null_rate: float = 0.1  # share of training captions replaced by the null caption, for guidance
    dtype: Dtype = "bfloat16"  # compute; parameters, softmax, norms, logits and losses stay float32
    remat: Literal["none", "full", "dots"] = "full"  # what the backward pass computes again
    scan_unroll: int = 1  # layers per iteration of the scan; more compiles longer and may run faster

    def __post_init__(self):
        for name in (
            "text_vocab", "text_len", "image_vocab", "grid", "dim", "layers", "heads", "mlp_ratio", "scan_unroll",
        ):  # fmt: skip
            _require(
                getattr(self, name) >= 1, f"DalleConfig.{name} is {getattr(self, name)}; want at least 1"
            )
        _require(
            self.dim % self.heads == 0,
            f"dim {self.dim} is not divisible by heads {self.heads}; change one of them",
        )
        _require(len(self.attention) > 0, "DalleConfig.attention is empty; name at least one kind, e.g. full")
        _require(
            self.conv_kernel % 2 == 1 and self.conv_kernel >= 1,
            f"conv_kernel is {self.conv_kernel}; want an odd number",
        )
        _require(
            0.0 <= self.text_loss_weight < 1.0,
            f"text_loss_weight is {self.text_loss_weight}; want a share in [0, 1)",
        )
        _require(0.0 <= self.null_rate <= 1.0, f"null_rate is {self.null_rate}; want a share in [0, 1]")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def num_codes(self) -> int:
        return self.grid**2

    @property
    def length(self) -> int:
        """Positions of the whole stream, text and image."""
        return self.text_len + self.num_codes

    @property
    def layer_kinds(self) -> tuple[AttentionKind, ...]:
        """Attention kind of every layer, first to last."""
        kinds = [self.attention[i % len(self.attention)] for i in range(self.layers)]
        if self.last_attention is not None:
            kinds[-1] = self.last_attention
        return tuple(kinds)


ModelConfig = DVAEConfig | DalleConfig


@dataclass(frozen=True, kw_only=True)
class ScenesSource:
    """Procedural captioned scenes, drawn on the fly (dalle_jax/data/scenes.py)."""

    kind: Literal["scenes"] = "scenes"
    count: int = 1_000_000  # scenes in the training split
    min_objects: int = 1
    max_objects: int = 4
    sizes: tuple[SceneSize, ...] = ("small", "medium", "large")
    fills: tuple[SceneFill, ...] = ("solid", "striped", "dotted")
    backgrounds: tuple[SceneBackground, ...] = ("plain", "gradient", "two-tone")
    seed: int = 0

    def __post_init__(self):
        _require(self.count >= 1, f"ScenesSource.count is {self.count}; want at least 1")
        _require(
            1 <= self.min_objects <= self.max_objects <= 4,
            f"objects per scene {self.min_objects}..{self.max_objects}; want 1 <= min <= max <= 4",
        )
        _require(
            len(self.fills) * len(self.sizes) * len(self.backgrounds) > 0
            and (self.max_objects == 1 or set(self.sizes) != {"large"}),
            f"scenes of sizes {self.sizes}, fills {self.fills}, backgrounds {self.backgrounds}; want at least one "
            "of each, and not only large ones where a scene holds two objects or more",
        )


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """Tar files of `NAME.(webp|png|jpg)` beside `NAME.json`, indexed once and read by random access.

    The JSON holds a list of English `captions` (or one string `caption`), optionally `captions_zh`, and a
    `split` for each picture.
    """

    kind: Literal["tar"] = "tar"
    path: str = ""  # one tar, or several separated by commas; globs allowed
    train_split: str = "train"  # value of `split` in the JSON
    eval_split: str = "val"
    captions_field: str = "captions"
    captions_zh_field: str = "captions_zh"
    max_bad_share: float = 0.05  # share of unusable records above which reading stops with a report

    def __post_init__(self):
        _require(
            0 <= self.max_bad_share <= 1, f"max_bad_share is {self.max_bad_share}; want a share in [0, 1]"
        )


SourceConfig = ScenesSource | TarSource


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows a step sees."""

    source: SourceConfig = field(default_factory=ScenesSource)
    codes: str | None = None  # a file of `dalle-jax encode RUN --data`: train on codes encoded ahead
    batch: int = 64  # global batch, rows per update over all devices and accumulation steps
    crop: Literal["none", "center", "random"] = "center"  # none squashes a picture that is not square
    languages: tuple[Language, ...] = ("en", "zh")  # of the captions
    seed: int = 0  # of the shuffle and of every random choice per row
    threads: int = 2  # that read and render ahead of the device
    prefetch: int = 4  # batches held ready

    def __post_init__(self):
        _require(self.batch >= 1, f"data.batch is {self.batch}; want at least 1")
        _require(self.threads >= 1, f"data.threads is {self.threads}; want at least 1")
        _require(self.prefetch >= 1, f"data.prefetch is {self.prefetch}; want at least 1")
        _require(
            len(self.languages) > 0 and len(set(self.languages)) == len(self.languages),
            f"data.languages is {self.languages}; want one or more different languages out of en, zh",
        )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Byte-pair encoding of the captions (2102.12092, 2.2: 16,384 pieces, lower case, 10% dropout)."""

    model: str | None = None  # a sentencepiece file to use; None trains one from the source's captions
    train_captions: int = 200_000  # captions read when training the vocabulary
    dropout: float = 0.1  # probability of skipping a merge while training
    lowercase: bool = True

    def __post_init__(self):
        _require(0.0 <= self.dropout < 1.0, f"text.dropout is {self.dropout}; want a probability in [0, 1)")
        _require(self.train_captions >= 1, f"text.train_captions is {self.train_captions}; want at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with decay on matrices only, clipping, warm-up and a schedule; averaged parameters."""

    learning_rate: float = 4.5e-4  # after warm-up; B.2
    warmup_steps: int = 5_000  # linear from 0; B.2
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up
    decay_steps: int | None = None  # updates from the start to the schedule's end; None is all of `steps`
    end_factor: float = 1 / 32  # last learning rate over the highest; B.2
    b1: float = 0.9
    b2: float = 0.96  # B.2
    eps: float = 1e-8
    weight_decay: float = 4.5e-2  # B.2
    clip_norm: float = 4.0  # of the global gradient norm; 0 turns it off; B.2
    accumulate: int = 1  # microbatches per update; the gradient is their mean
    ema_decay: float = 0.99  # of the averaged parameters used for sampling; 0 turns averaging off; B.2
    ema_every: int = 25  # updates between averages; B.2

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optim.learning_rate is {self.learning_rate}; want more than 0")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; want 0 or more")
        _require(self.accumulate >= 1, f"optim.accumulate is {self.accumulate}; want at least 1")
        _require(self.clip_norm >= 0, f"optim.clip_norm is {self.clip_norm}; want 0 (off) or more")
        _require(0 <= self.ema_decay < 1, f"optim.ema_decay is {self.ema_decay}; want [0, 1)")
        _require(self.ema_every >= 1, f"optim.ema_every is {self.ema_every}; want at least 1")
        _require(0 <= self.end_factor <= 1, f"optim.end_factor is {self.end_factor}; want [0, 1]")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1: all devices that are left."""

    data: int = -1  # batch is split; parameters are copied
    fsdp: int = 1  # batch is split; parameters and optimizer state are split too
    model: int = 1  # heads and channels are split
    cpu_devices: int = (
        0  # without an accelerator: devices to split the CPU into, 0 leaves it one; a core each is
    )
    # faster than one device of many cores

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.model)
        _require(
            all(s >= 1 or s == -1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh data={self.data} fsdp={self.fsdp} model={self.model}; want sizes of at least 1, at most one -1",
        )
        _require(self.cpu_devices >= 0, f"mesh.cpu_devices is {self.cpu_devices}; want 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The type of `model` is the stage."""

    model: ModelConfig
    run: str = ""  # run directory; everything that a run makes is in it
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)  # stage dalle
    tokenizer: str | None = None  # stage dalle: run directory of the trained tokenizer
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 100_000  # updates
    seed: int = 0
    log_every: int = 10  # updates between lines of metrics.jsonl
    eval_every: int = 1_000  # updates between measurements on the evaluation split
    eval_rows: int = 256  # rows per measurement
    sample_every: int = 5_000  # updates between PNG grids
    save_every: int = 1_000  # updates between checkpoints
    keep: int = 3  # latest checkpoints kept; the best by the stage's measure is kept as well

    def __post_init__(self):
        _require(self.steps >= 1, f"steps is {self.steps}; want at least 1")
        for name in ("log_every", "eval_every", "eval_rows", "sample_every", "save_every", "keep"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; want at least 1")
        _require(
            self.data.batch % self.optim.accumulate == 0,
            f"data.batch {self.data.batch} is not divisible by optim.accumulate {self.optim.accumulate}; change one",
        )
        if isinstance(self.model, DVAEConfig):
            _require(
                self.data.codes is None, "data.codes is for the stage dalle; a tokenizer trains on pixels"
            )
            _require(self.tokenizer is None, "tokenizer is for the stage dalle; remove it from a dvae config")


# --- JSON -----------------------------------------------------------------------------------------------


def to_json(config: Any) -> str:
    """The configuration as JSON text, every field written out; floats round-trip exactly."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(cls: Any, text: str) -> Any:
    """The configuration of class `cls` (or of one class of a union) that `text` describes.

    Raises ValueError for text that is not JSON, for a field that the class does not have (with the nearest
    name it does have), and for a value of another type; each names the path of the field.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    return _build(cls, data, cls.__name__ if isinstance(cls, type) else "config")


def _build(kind: Any, data: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _build_union(typing.get_args(kind), data, path)
    if origin is Literal:
        options = typing.get_args(kind)
        _require(data in options, f"{path}: got {data!r}, want one of {', '.join(map(repr, options))}")
        return data
    if origin is tuple:
        _require(isinstance(data, (list, tuple)), f"{path}: got {data!r}, want a list")
        item = typing.get_args(kind)[0]
        return tuple(_build(item, value, f"{path}[{i}]") for i, value in enumerate(data))
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, data, path)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    good = isinstance(data, kind) and not (isinstance(data, bool) and kind is not bool)
    _require(good, f"{path}: got {data!r}, want a {kind.__name__}")
    return data


def _build_union(options: tuple, data: Any, path: str) -> Any:
    if data is None:
        _require(type(None) in options, f"{path}: got null, want a value")
        return None
    classes = [o for o in options if dataclasses.is_dataclass(o)]
    if not classes:
        return _build(next(o for o in options if o is not type(None)), data, path)
    kinds = {typing.get_args(typing.get_type_hints(c)["kind"])[0]: c for c in classes}
    kind = data.get("kind") if isinstance(data, dict) else None
    _require(kind in kinds, f"{path}.kind: got {kind!r}, want one of {', '.join(map(repr, kinds))}")
    return _build_dataclass(kinds[kind], data, path)


def _build_dataclass(cls: type, data: Any, path: str) -> Any:
    _require(
        isinstance(data, dict), f"{path}: got {data!r}, want an object with the fields of {cls.__name__}"
    )
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; perhaps you meant {near[0]!r}" if near else f"; it has {', '.join(hints)}"
            raise ValueError(f"{path}: {cls.__name__} has no field {name!r}{hint}")
    values = {name: _build(hints[name], value, f"{path}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing
        raise ValueError(f"{path}: {error}") from None
