"""Diffusion models: noise schedule, prediction, U-Net and conditions."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from dalle_jax.config.schema import (
    frozen_config,
    require,
    require_at_least,
    require_divisible,
    require_fraction,
)
from dalle_jax.config.tokenizer import Dtype

NoiseKind = Literal["linear", "cosine", "ddpm", "ve", "edm"]
Prediction = Literal["eps", "x0", "v", "score"]
Weighting = Literal["simple", "min_snr", "likelihood"]
SamplerName = Literal["ancestral", "ddim", "euler", "heun", "dpm++2m", "pc"]
Spacing = Literal["uniform", "log_snr", "karras"]  # of a sampler's times


@frozen_config
class NoiseConfig:
    """The noise schedule over time t in [0, 1]: x_t = alpha(t) x_0 + sigma(t) eps.

    linear, cosine, ddpm are variance preserving (alpha^2 + sigma^2 = 1), ve and edm variance exploding (alpha = 1).
    """

    kind: NoiseKind = "linear"
    beta_min: float = 0.1  # linear, ddpm: beta(0) per unit of t; 2011.13456, C
    beta_max: float = 20.0  # linear, ddpm: beta(1) per unit of t; 2011.13456, C
    num_timesteps: int = (
        1000  # ddpm: discrete steps; betas from beta_min / steps to beta_max / steps; 2006.11239, 4
    )
    sigma_min: float = 0.01  # ve 0.01 (2011.13456, C), edm 0.002 (2206.00364, table 1)
    sigma_max: float = 50.0  # ve 50 (2011.13456, C), edm 80 (2206.00364, table 1)
    rho: float = 7.0  # edm: exponent of the spacing of sigma over t; 2206.00364, eq. 5
    # Factor of sigma(t) / alpha(t) of variance-preserving schedules: above 1, more of the time has high noise.
    # 2301.11093, 3.1, in proportion to the image side.
    shift: float = 1.0
    zero_terminal_snr: bool = False  # no signal at t = 1; 2305.08891, 3.1
    t_min: float = 1e-3  # smallest time of training and sampling; the last sampling step goes from it to 0

    def __post_init__(self):
        require(
            0 < self.beta_min < self.beta_max,
            f"Expected 0 < beta_min < beta_max in NoiseConfig, got {self.beta_min} and {self.beta_max}.",
        )
        require(
            0 < self.sigma_min < self.sigma_max,
            f"Expected 0 < sigma_min < sigma_max in NoiseConfig, got {self.sigma_min} and {self.sigma_max}.",
        )
        require(
            self.num_timesteps >= 2 and self.beta_max < self.num_timesteps,
            f"Expected NoiseConfig.num_timesteps of at least 2 and more than beta_max {self.beta_max}, "
            f"got {self.num_timesteps}.",
        )
        require_at_least(self, 1, "rho")
        require(
            0 < self.shift < math.inf,
            f"Expected a finite NoiseConfig.shift above 0, got {self.shift}. Use 1 for no shift.",
        )
        require(
            self.shift == 1 or self.kind not in ("ve", "edm"),
            f"Expected NoiseConfig.shift 1 with kind {self.kind}, got {self.shift}. Set sigma_min and sigma_max.",
        )
        require(0 < self.t_min < 1, f"Expected NoiseConfig.t_min in (0, 1), got {self.t_min}.")
        require(
            not (self.zero_terminal_snr and self.kind in ("ve", "edm")),
            f"Expected NoiseConfig.zero_terminal_snr False with kind {self.kind}, got True. "
            "Use a variance-preserving kind.",
        )


@frozen_config
class TextEncoderConfig:
    """The Transformer that encodes captions for the U-Net (2112.10741, 2.2)."""

    text_vocab: int = 16_384  # BPE pieces, without the padding tokens
    text_len: int = 128  # text positions; shorter captions are padded
    dim: int = 512
    layers: int = 16
    heads: int = 8
    mlp_ratio: int = 4

    def __post_init__(self):
        require_at_least(self, 1, "text_vocab", "text_len", "dim", "layers", "heads", "mlp_ratio")
        require_divisible(self, "dim", "heads")


@frozen_config
class CodesConfig:
    """Image tokens as a condition: the U-Net decodes the codes of an image tokenizer."""

    vocab: int = 8192  # the tokenizer's codes
    grid: int = 32  # codes form a grid x grid raster
    width: int = 64  # channels of a code's embedding, concatenated with the noised image

    def __post_init__(self):
        require_at_least(self, 1, "vocab", "grid", "width")


@frozen_config
class DiffusionConfig:
    """A diffusion model of pixels: U-Net (2006.11239, B; 2105.05233, 3), conditions, noise and loss.

    The defaults are the network of 2006.11239 for CIFAR-10.
    """

    kind: Literal["diffusion"] = "diffusion"
    image_size: int = 32  # side of the image, pixels
    patch_size: int = 1  # pixels on the side of a patch, one position of the network; 2301.11093, 3.3
    width: int = 128  # channels of the first level
    channel_multipliers: tuple[int, ...] = (
        1,
        2,
        2,
        2,
    )  # of `width`, one for each level; sides halve between levels
    blocks: int = 2  # residual blocks of a level on the way down; one more on the way up
    # Sides, in positions, of the levels with attention; the middle block always has it.
    attention_sizes: tuple[int, ...] = (16,)
    head_dim: int | None = None  # channels of an attention head; None is one head of all channels
    scale_shift_norm: bool = (
        False  # scale and shift by the time embedding after the norm instead of adding it; 2105.05233, 3.1
    )
    resample: Literal["conv", "block"] = "conv"  # down- and upsampling by a convolution or a residual block
    # Groups of the norms. None is 32, or fewer, so that each has 4 channels: a group of one channel would cancel the
    # added time embedding.
    norm_groups: int | None = None
    dropout: float = 0.1  # inside residual blocks
    text: TextEncoderConfig | None = None  # captions
    num_classes: int = 0  # labels 0 to num_classes - 1; 0 is no such condition
    codes: CodesConfig | None = None  # image tokens
    low_res_size: int = 0  # side of a low-resolution image, pixels; 0 is no such condition
    cond_drop_prob: float = (
        0.1  # fraction of training rows without caption and label, for guidance; 2207.12598
    )
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(kind="ddpm"))
    prediction: Prediction = "eps"
    weighting: Weighting = "simple"
    dtype: Dtype = "float32"  # compute; parameters, norms, softmax and losses stay float32
    remat: bool = False  # recompute the inside of blocks in the backward pass

    def __post_init__(self):
        require_at_least(self, 1, "image_size", "patch_size", "width", "blocks")
        require(
            len(self.channel_multipliers) > 0 and min(self.channel_multipliers) >= 1,
            "Expected DiffusionConfig.channel_multipliers of one or more numbers of at least 1, "
            f"got {self.channel_multipliers}.",
        )
        halved = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
        require(
            self.image_size % halved == 0,
            "Expected DiffusionConfig.image_size divisible "
            f"by {halved}, patch_size {self.patch_size} doubled {len(self.channel_multipliers) - 1} times, got "
            f"{self.image_size}. "
            "Change image_size, patch_size or the number of channel_multipliers.",
        )
        missing = [side for side in self.attention_sizes if side not in self.sizes]
        require(
            not missing,
            f"Expected DiffusionConfig.attention_sizes out of {self.sizes}, the sides of the levels, "
            f"got {self.attention_sizes}.",
        )
        widths = [self.width * m for m, s in zip(self.channel_multipliers, self.sizes, strict=True)
                  if s in self.attention_sizes or s == self.sizes[-1]]  # fmt: skip
        require(
            self.head_dim is None or (self.head_dim >= 1 and all(w % self.head_dim == 0 for w in widths)),
            f"Expected DiffusionConfig.head_dim to divide {widths}, the widths with attention, got {self.head_dim}.",
        )
        require_at_least(self, 1, "norm_groups")
        require_fraction(self, "dropout", below_one=True)
        require_at_least(self, 0, "num_classes", hint="Use 0 for no labels.")
        require(
            0 <= self.low_res_size < self.image_size
            and (not self.low_res_size or self.image_size % self.low_res_size == 0),
            f"Expected DiffusionConfig.low_res_size to be a divisor of image_size {self.image_size} below it, "
            f"got {self.low_res_size}. Use 0 for no such condition.",
        )
        num_positions = self.image_size // self.patch_size
        require(
            self.codes is None or num_positions % self.codes.grid == 0,
            f"Expected codes.grid to divide the {num_positions} positions of a side, "
            f"got {getattr(self.codes, 'grid', 0)}.",
        )
        require_fraction(self, "cond_drop_prob")
        require(
            not (self.noise.zero_terminal_snr and self.prediction in ("eps", "score")),
            f"Expected DiffusionConfig.prediction v or x0 with zero_terminal_snr, got {self.prediction}.",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each level, positions."""
        return tuple(
            self.image_size // self.patch_size >> level for level in range(len(self.channel_multipliers))
        )

    @property
    def supports_cfg(self) -> bool:
        """Whether there is a condition for classifier-free guidance."""
        return self.text is not None or self.num_classes > 0
