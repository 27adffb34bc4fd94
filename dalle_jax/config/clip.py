"""CLIP: two towers that embed images and captions in one space."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from dalle_jax.config.schema import frozen_config, require, require_at_least, require_divisible
from dalle_jax.config.tokenizer import Dtype


@frozen_config
class TowerConfig:
    """The Transformer of one tower (2103.00020, 2.4 and table 20)."""

    dim: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: int = 4

    def __post_init__(self):
        require_at_least(self, 1, "dim", "layers", "heads", "mlp_ratio")
        require_divisible(self, "dim", "heads")


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
    scan_unroll: int | None = (
        None  # layers per iteration of the loop; None: all of up to 8 layers, or 1 of more
    )

    def __post_init__(self):
        require_at_least(
            self, 1, "image_size", "patch_size", "text_vocab", "embed_dim", "grad_cache_chunks", "scan_unroll"
        )
        require_divisible(self, "image_size", "patch_size")
        require_at_least(self, 3, "text_vocab", hint="Use one or more pieces, a start and an end.")
        require_at_least(self, 3, "text_len", hint="A caption has a start, pieces and an end.")
        for name in ("pixel_mean", "pixel_std"):
            require(
                len(getattr(self, name)) == 3,
                f"Expected ClipConfig.{name} of three numbers, got {getattr(self, name)}.",
            )
        require(
            min(self.pixel_std) > 0,
            f"Expected ClipConfig.pixel_std of numbers above 0, got {self.pixel_std}.",
        )
        require(
            0 < self.logit_scale_init <= self.logit_scale_max,
            f"Expected ClipConfig.logit_scale_init above 0 and at most logit_scale_max {self.logit_scale_max:g}, "
            f"got {self.logit_scale_init:g}.",
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
