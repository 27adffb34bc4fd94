"""The encoder-decoder Transformer of DALL-E Mini and Mega."""

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


@frozen_config
class BartConfig:
    """An encoder of captions and a decoder of image tokens with cross-attention (Dayma et al. 2021; BART,
    1910.13461)."""

    kind: Literal["bart"] = "bart"
    text_vocab: int = 50_264  # pieces
    text_len: int = 64  # text positions; shorter captions are padded
    image_vocab: int = 16_384  # the tokenizer's codes
    decoder_vocab: int = 16_385  # rows of the decoder's embedding and logits, more than there are codes
    decoder_start_id: int = 16_384  # input before the first code
    grid: int = 16  # image tokens form a grid x grid raster
    dim: int = 1024
    encoder_layers: int = 12
    layers: int = 12  # of the decoder
    heads: int = 16
    mlp_width: int = 2730  # channels between the gated layers (2002.05202)
    pad_id: int = 1  # after a caption; masked
    bos_id: int = 0  # before a caption
    eos_id: int = 2  # after a caption
    cond_drop_prob: float = 0.1  # fraction of training captions replaced by the null caption, for guidance
    dtype: Dtype = "bfloat16"  # compute; parameters, softmax, norms, logits and losses stay float32
    remat: Literal["none", "full"] = "full"  # activations that the backward pass recomputes

    def __post_init__(self):
        require_at_least(
            self,
            1,
            "text_vocab",
            "image_vocab",
            "grid",
            "dim",
            "encoder_layers",
            "layers",
            "heads",
            "mlp_width",
        )
        require_at_least(self, 2, "text_len", hint="A caption has a start and an end.")
        require_divisible(self, "dim", "heads")
        require(
            max(self.image_vocab, self.decoder_start_id + 1) <= self.decoder_vocab,
            f"Expected BartConfig.decoder_vocab of more than decoder_start_id {self.decoder_start_id} and at "
            f"least image_vocab {self.image_vocab}, "
            f"got {self.decoder_vocab}.",
        )
        require_id(self, self.text_vocab, "pad_id", "bos_id", "eos_id")
        require_fraction(self, "cond_drop_prob")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def num_codes(self) -> int:
        return self.grid**2

    @property
    def seq_len(self) -> int:
        """Positions of both streams, text and image."""
        return self.text_len + self.num_codes

    @property
    def layer_kinds(self) -> tuple[Literal["full"], ...]:
        """Attention kind of every layer of the decoder, as in `DalleConfig`."""
        return ("full",) * self.layers
