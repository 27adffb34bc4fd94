"""The autoregressive Transformer over text and image tokens."""

from __future__ import annotations

from typing import Literal

from dalle_jax.config.schema import (
    frozen_config,
    require,
    require_at_least,
    require_divisible,
    require_fraction,
    require_id,
)
from dalle_jax.config.tokenizer import Dtype

AttentionKind = Literal["full", "row", "column", "conv", "conv_clamped", "conv_torus"]
AttentionKernel = Literal["auto", "dense", "splash", "cudnn"]
Quantization = Literal["int8", "fp8", "w8a8"]  # of the matrices when sampling (nn/linear.py)
Remat = Literal["none", "full", "dots", "mlp", "save_attention"]


@frozen_config
class T5Config:
    """A T5 v1.1 encoder (1910.10683); the defaults are flan-t5-xl's. Its vocabulary is the Transformer's."""

    dim: int = 2048
    layers: int = 24
    heads: int = 32
    mlp_width: int = 5120  # channels between the gated layers (2002.05202)
    num_relative_buckets: int = 32  # of the distances between positions
    eos_id: int = 1  # after a caption

    def __post_init__(self):
        require_at_least(self, 1, "dim", "layers", "heads", "mlp_width")
        require_divisible(self, "dim", "heads")
        require(
            self.num_relative_buckets >= 4 and self.num_relative_buckets % 4 == 0,
            f"Expected T5Config.num_relative_buckets to be a multiple of 4, got {self.num_relative_buckets}. "
            "They are for two directions, near and far.",
        )
        require_at_least(self, 0, "eos_id")


@frozen_config
class DalleConfig:
    """The autoregressive Transformer over text and image tokens (2102.12092, 2.2 and B)."""

    kind: Literal["dalle"] = "dalle"
    text_vocab: int = 16_384  # BPE pieces, without the padding tokens
    text_len: int = 256  # text positions; shorter captions are padded
    image_vocab: int = 8192  # the tokenizer's codes
    grid: int = 32  # image tokens form a grid x grid raster
    dim: int = 3968
    layers: int = 64
    heads: int = 62
    mlp_ratio: int = 4
    mlp_width: int | None = None  # channels inside the MLP; None is mlp_ratio * dim
    # of the MLP; swiglu is gated (2002.05202)
    activation: Literal["gelu-tanh", "gelu", "quick-gelu", "swiglu"] = "gelu-tanh"
    norm: Literal["layer", "rms"] = "layer"  # RMS norms have no bias (1910.07467)
    sandwich_norm: bool = (
        False  # also normalize the output of attention and MLP before the sum (2105.13290, 2.4)
    )
    biases: bool = True  # of the matrices of the blocks
    # Position embedding of image tokens: axial, a row and a column embedding; learned, one per position; rope2d, rotary
    # by row and column (2104.09864), where text positions have zero queries and keys, as in LlamaGen (2406.06525).
    pos_embed: Literal["axial", "learned", "rope2d"] = "axial"
    pad_id: int | None = None  # piece after a caption; None: a learned padding token for each position
    # A frozen encoder of captions, as in LlamaGen's t2i models: its outputs are the inputs of the text positions,
    # padded on the left, and the padding is masked. None: a learned embedding of the pieces.
    text_encoder: T5Config | None = None
    second_final_norm: bool = False  # a second norm after the last block
    head_bias: bool = False
    attention: tuple[AttentionKind, ...] = ("row", "column", "row", "row")  # cycled over the layers; B.1
    last_attention: AttentionKind | None = "conv"  # kind of the last layer; None continues the cycle; B.1
    # Attention masks are shifted by one: they treat the last text token as the first image position, as ruDALL-E
    # Malevich v2 does.
    shift_masks: bool = False
    conv_kernel: int = 11  # side of the conv mask's window, odd; B.1
    qk_norm: bool = (
        False  # RMS-normalize queries and keys per head; not in the paper, allows larger learning rates
    )
    text_loss_weight: float = (
        1 / 8
    )  # of the text cross-entropy; the image loss has the rest; 0: no text head; 2.2
    cond_drop_prob: float = 0.1  # fraction of training captions replaced by the null caption, for guidance
    dtype: Dtype = "bfloat16"  # compute; parameters, softmax, norms, logits and losses stay float32
    # Attention in training: splash is for TPU, cudnn for NVIDIA GPUs in bfloat16, dense for any device; auto selects by
    # the devices (nn/flash.py).
    attention_kernel: AttentionKernel = "auto"
    # Activations that the backward pass recomputes, least memory first: full, all of a layer; save_attention, all but
    # attention; mlp, the MLP; dots, all but matrix products; none.
    remat: Remat = "full"
    loss_vocab_chunk: int = 2048  # columns of logits that the loss holds at once; 0 holds all
    scan_unroll: int | None = (
        None  # layers per iteration of the loop; None: all of up to 8 layers, or 1 of more
    )

    def __post_init__(self):
        require_at_least(
            self,
            1,
            "text_vocab",
            "text_len",
            "image_vocab",
            "grid",
            "dim",
            "layers",
            "heads",
            "mlp_ratio",
            "scan_unroll",
        )
        require_at_least(self, 0, "loss_vocab_chunk", hint="Use 0 to compute all logits at once.")
        require_divisible(self, "dim", "heads")
        require_at_least(self, 1, "mlp_width", hint="Use None for mlp_ratio * dim.")
        require_id(self, self.text_vocab, "pad_id")
        require(
            self.pos_embed != "rope2d" or self.head_dim % 4 == 0,
            f"Expected dim / heads to be a multiple of 4 for pos_embed rope2d, got {self.head_dim}. "
            "Change DalleConfig.dim or heads.",
        )
        require(
            len(self.attention) > 0,
            "Expected at least one kind in DalleConfig.attention, got none. Use e.g. full.",
        )
        require(
            self.conv_kernel % 2 == 1 and self.conv_kernel >= 1,
            f"Expected an odd DalleConfig.conv_kernel of at least 1, got {self.conv_kernel}.",
        )
        require_fraction(self, "text_loss_weight", below_one=True)
        if self.text_encoder is not None:
            self._check_text_encoder(self.text_encoder)
        require_fraction(self, "cond_drop_prob")

    def _check_text_encoder(self, encoder: T5Config) -> None:
        """Check fields that have one value with an encoder: its captions are no tokens of the sequence."""
        for name, expected in (("text_loss_weight", 0.0), ("pad_id", None), ("shift_masks", False)):
            value = getattr(self, name)
            require(
                value == expected,
                f"Expected DalleConfig.{name} to be {expected} with a text_encoder, got {value}.",
            )
        require(
            self.attention_kernel in ("auto", "dense"),
            f"Expected DalleConfig.attention_kernel auto or dense with a text_encoder, got {self.attention_kernel}. "
            "Only dense masks different positions in each row.",
        )
        require(
            encoder.eos_id < self.text_vocab,
            f"Expected text_encoder.eos_id in [0, {self.text_vocab}), got {encoder.eos_id}.",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def mlp_dim(self) -> int:
        """Channels inside the MLP."""
        return self.mlp_ratio * self.dim if self.mlp_width is None else self.mlp_width

    @property
    def num_text_ids(self) -> int:
        """Rows of the text embedding: the pieces, and a padding token for each position if there are any."""
        pads = self.pad_id is None and self.text_encoder is None
        return self.text_vocab + (self.text_len if pads else 0)

    @property
    def num_codes(self) -> int:
        return self.grid**2

    @property
    def seq_len(self) -> int:
        """Positions of text and image."""
        return self.text_len + self.num_codes

    @property
    def layer_kinds(self) -> tuple[AttentionKind, ...]:
        """Attention kind of every layer, first to last."""
        kinds = [self.attention[i % len(self.attention)] for i in range(self.layers)]
        if self.last_attention is not None:
            kinds[-1] = self.last_attention
        return tuple(kinds)
