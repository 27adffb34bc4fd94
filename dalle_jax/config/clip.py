"""CLIP: two towers that embed images and captions in one space."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from dalle_jax.config.schema import frozen_config, require
from dalle_jax.config.tokenizer import Dtype


@frozen_config
class TowerConfig:
    """The Transformer of one tower (2103.00020, 2.4 and table 20)."""

    dim: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: int = 4

    def __post_init__(self):
        for name in ("dim", "layers", "heads", "mlp_ratio"):
            require(getattr(self, name) >= 1, f"TowerConfig.{name} is {getattr(self, name)}; want at least 1")
        require(
            self.dim % self.heads == 0,
            f"TowerConfig.dim {self.dim} is not divisible by heads {self.heads}; change one of them",
        )


@frozen_config
class ClipConfig:
    """Contrastive language-image pre-training (2103.00020); the defaults are the published ViT-B/32."""

    kind: Literal["clip"] = "clip"
    image_size: int = 224  # side, pixels; other images are resized
    patch_size: int = 32  # side of a patch, pixels
    vision: TowerConfig = field(default_factory=lambda: TowerConfig(dim=768, heads=12))
    text: TowerConfig = field(default_factory=TowerConfig)
    text_vocab: int = 49_408  # rows of the token embedding: pieces, then the start and the end of a caption
    text_len: int = 77  # positions with start and end; longer captions are truncated
    embed_dim: int = 512  # of the joint space
    # quick-gelu is x sigmoid(1.702 x), as in the published model.
    activation: Literal["gelu", "quick-gelu"] = "quick-gelu"
    # Of the training images, per channel, in [0, 1]; the published ones.
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    logit_scale_init: float = 1 / 0.07  # factor of the cosines in the softmax, before training; 2.5
    logit_scale_max: float = 100.0  # upper bound of the learned factor; 2.5
    grad_cache_chunks: int = (
        1  # parts of a batch that pass the towers in turn: less memory, same loss; 2101.06983
    )
    dtype: Dtype = "bfloat16"  # compute; parameters, softmax, norms, vectors and loss stay float32
    remat: Literal["none", "full"] = (
        "none"  # activations that the backward pass recomputes; chunks are always recomputed
    )
    scan_unroll: int = 1  # layers per iteration of the scan; more compiles longer and may run faster

    def __post_init__(self):
        for name in (
            "image_size",
            "patch_size",
            "text_vocab",
            "embed_dim",
            "grad_cache_chunks",
            "scan_unroll",
        ):
            require(getattr(self, name) >= 1, f"ClipConfig.{name} is {getattr(self, name)}; want at least 1")
        require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; change one of them",
        )
        require(self.text_vocab >= 3, f"text_vocab is {self.text_vocab}; want a piece, a start and an end")
        require(self.text_len >= 3, f"text_len is {self.text_len}; want room for a start, a piece and an end")
        for name in ("pixel_mean", "pixel_std"):
            require(len(getattr(self, name)) == 3, f"{name} is {getattr(self, name)}; want three numbers")
        require(min(self.pixel_std) > 0, f"pixel_std is {self.pixel_std}; want numbers above 0")
        require(
            0 < self.logit_scale_init <= self.logit_scale_max,
            f"logit_scale_init is {self.logit_scale_init:g}, logit_scale_max {self.logit_scale_max:g}; want 0 < start <= most",
        )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def bos_id(self) -> int:
        return self.text_vocab - 2

    @property
    def eos_id(self) -> int:
        return self.text_vocab - 1
