"""The autoregressive Transformer over text and image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_jax.config.checks import require
from dalle_jax.config.tokenizer import Dtype

AttentionKind = Literal["full", "row", "column", "conv"]


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
            require(getattr(self, name) >= 1, f"DalleConfig.{name} is {getattr(self, name)}; want at least 1")
        require(
            self.dim % self.heads == 0,
            f"dim {self.dim} is not divisible by heads {self.heads}; change one of them",
        )
        require(len(self.attention) > 0, "DalleConfig.attention is empty; name at least one kind, e.g. full")
        require(
            self.conv_kernel % 2 == 1 and self.conv_kernel >= 1,
            f"conv_kernel is {self.conv_kernel}; want an odd number",
        )
        require(
            0.0 <= self.text_loss_weight < 1.0,
            f"text_loss_weight is {self.text_loss_weight}; want a share in [0, 1)",
        )
        require(0.0 <= self.null_rate <= 1.0, f"null_rate is {self.null_rate}; want a share in [0, 1]")

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
