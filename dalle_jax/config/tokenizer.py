"""Image tokenizers: sizes of the networks, quantizers, and the weights and schedules of their losses."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from dalle_jax.config.schema import frozen_config, require, require_above_zero, require_at_least

Dtype = Literal["float32", "bfloat16"]


@frozen_config
class Schedule:
    """Half-cosine from `start` to `end` over `steps` updates, constant afterwards (2102.12092, A.2)."""

    start: float  # value before the first update
    end: float  # value after the last of `steps`
    steps: int  # updates; 0 means `end` from the start

    def __post_init__(self):
        require_at_least(self, 0, "steps")


@frozen_config
class DVAEConfig:
    """Discrete VAE: sizes of the network and the schedules of its loss (2102.12092, 2.1 and A)."""

    kind: Literal["dvae"] = "dvae"
    image_size: int = 256  # side of the square image, pixels
    groups: int = 4  # resolutions; sides halve between them, 2**(groups-1) in all
    blocks: int = 2  # residual blocks per group
    width: int = 256  # channels at full resolution; doubled at each group
    decoder_width: int = 128  # channels right after the codebook
    vocab: int = 8192  # codes; A.1
    tau: Schedule = Schedule(start=1.0, end=1 / 16, steps=150_000)  # Gumbel temperature; A.2
    kl_weight: Schedule = Schedule(start=0.0, end=6.6, steps=5_000)  # beta; A.2
    # Of the KL divergence of a batch's mean code distribution from uniform; prevents codebook collapse in short runs;
    # not in the paper.
    code_usage_weight: Schedule = Schedule(start=0.0, end=0.0, steps=0)
    # Smallest scale b of the logit-Laplace density. Above 0, the likelihood of flat areas cannot outweigh that of
    # edges; 0 in the paper.
    min_scale: float = 0.0
    dtype: Dtype = "float32"  # of the convolutions; logits, softmax and loss stay float32

    def __post_init__(self):
        require_at_least(self, 1, "image_size", "groups", "blocks", "width", "decoder_width", "vocab")
        require(
            self.image_size % self.downsample == 0,
            f"Expected DVAEConfig.image_size divisible by {self.downsample} = 2**(groups-1), "
            f"got {self.image_size}. Change image_size or groups.",
        )
        require(
            self.width % 4 == 0,
            f"Expected DVAEConfig.width to be a multiple of 4, got {self.width}. "
            "The bottlenecks have a quarter of the channels.",
        )
        require_at_least(self, 0, "min_scale")
        _check_temperature(self)

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


def _check_temperature(config: DVAEConfig | GumbelQuantizer) -> None:
    start, end = config.tau.start, config.tau.end
    require(
        start > 0 and end > 0,
        f"Expected {type(config).__name__}.tau with start and end above 0, got {start} and {end}.",
    )


@frozen_config
class VectorQuantizer:
    """The nearest code of a learned codebook (van den Oord et al. 2017, 1711.00937)."""

    kind: Literal["vq"] = "vq"
    vocab: int = 16_384  # codes
    dim: int = 256  # width of a code; with `normalize` a small one, e.g. 8, avoids codebook collapse
    normalize: bool = False  # compare on the unit sphere (Yu et al. 2021, 2110.04627, 3.2)
    codebook_weight: float = 1.0  # of the term that pulls codes to the encoder's output
    commitment_weight: float = 0.25  # of the term that pulls the encoder's output to its code
    dead_code_restart_steps: int = (
        0  # updates without use after which a code is reinitialized; 0 is off (2005.08520)
    )

    def __post_init__(self):
        require_at_least(self, 2, "vocab")
        require_at_least(self, 0, "dead_code_restart_steps", hint="Use 0 to turn restarts off.")
        require_at_least(self, 1, "dim")
        require_at_least(self, 0, "codebook_weight", "commitment_weight")


@frozen_config
class GumbelQuantizer:
    """Gumbel-softmax over a learned codebook, straight-through (Jang et al. 2016, 1611.01144)."""

    kind: Literal["gumbel"] = "gumbel"
    vocab: int = 8192
    dim: int = 256
    tau: Schedule = Schedule(start=1.0, end=1 / 16, steps=150_000)  # temperature
    kl_weight: float = 5e-4  # of the divergence from the uniform distribution, nats per code

    def __post_init__(self):
        require_at_least(self, 2, "vocab")
        require_at_least(self, 1, "dim")
        require_at_least(self, 0, "kl_weight")
        _check_temperature(self)


@frozen_config
class FiniteScalarQuantizer:
    """Every channel rounded to a few levels; no codebook to learn (Mentzer et al. 2023, 2309.15505)."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)  # per channel; the product is the vocabulary; table 1

    def __post_init__(self):
        require(
            len(self.levels) > 0 and min(self.levels) >= 2,
            f"Expected FiniteScalarQuantizer.levels of one or more numbers of at least 2, got {self.levels}.",
        )

    @property
    def vocab(self) -> int:
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        return len(self.levels)


Quantizer = VectorQuantizer | GumbelQuantizer | FiniteScalarQuantizer


@frozen_config
class AdversarialConfig:
    """A patch discriminator that is trained against the decoder (Esser et al. 2020, 2012.09841, 3.1)."""

    loss: Literal["non-saturating", "hinge"] = "hinge"
    weight: float = 0.8  # of the decoder's adversarial term, times the adaptive weight
    disc_start_step: int = 250_001  # updates before the discriminator is trained
    disc_warmup_steps: int = (
        10_000  # updates after `disc_start_step` over which `weight` rises linearly from 0; 0: at once
    )
    max_adaptive_weight: float = 1e4  # the adaptive weight, a ratio of gradient norms, is clipped to this
    # Gamma of the gradient penalty on real images (Mescheder et al. 2018, 1801.04406); 0 is off.
    r1_weight: float = 10.0
    r1_every: int = (
        16  # updates between penalties, each scaled by their number (Karras et al. 2019, 1912.04958)
    )
    width: int = 64  # channels of the discriminator's first layer
    layers: int = 3  # downsampling layers; 3 have a receptive field of 70 pixels
    learning_rate: float = 1e-4  # of the discriminator; constant
    b1: float = 0.5
    b2: float = 0.9

    def __post_init__(self):
        require_at_least(self, 1, "r1_every", "width", "layers")
        require_at_least(self, 0, "weight", "disc_start_step", "disc_warmup_steps", "r1_weight")
        require_above_zero(self, "max_adaptive_weight", "learning_rate")


@frozen_config
class VQGANConfig:
    """Convolutional tokenizer with a choice of quantizers, trained adversarially (2012.09841)."""

    kind: Literal["vqgan"] = "vqgan"
    image_size: int = 256  # side of the square image, pixels
    width: int = 128  # channels at full resolution
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of `width`, one per resolution
    blocks: int = 2  # residual blocks per resolution; the decoder has one more
    attention_levels: tuple[int, ...] = (4,)  # resolutions with attention after each block; 0 is the full one
    latent_width: int = 256  # channels between the networks and the quantizer
    quantizer: Quantizer = field(default_factory=VectorQuantizer)
    pixel_range: Literal["symmetric", "unit"] = "symmetric"  # of the networks: [-1, 1] or [0, 1]
    pixel_weight: float = 1.0  # of the mean absolute error of the pixels, in the networks' range
    perceptual_weight: float = 1.0  # of LPIPS, or of the Laplacian pyramid distance if `lpips` is None
    lpips: str | None = None  # npz with the weights of LPIPS (AlexNet or VGG16)
    adversarial: AdversarialConfig | None = field(default_factory=AdversarialConfig)  # None: no discriminator
    dtype: Dtype = "float32"  # of the convolutions; norms, attention, quantizer and losses stay float32

    def __post_init__(self):
        require_at_least(self, 1, "image_size", "width", "blocks", "latent_width")
        require(
            len(self.channel_multipliers) > 0 and min(self.channel_multipliers) >= 1,
            "Expected VQGANConfig.channel_multipliers of one or more numbers of at least 1, "
            f"got {self.channel_multipliers}.",
        )
        require(
            self.image_size % self.downsample == 0,
            f"Expected VQGANConfig.image_size divisible by {self.downsample} = 2**(resolutions-1), "
            f"got {self.image_size}. Change image_size or the number of channel_multipliers.",
        )
        require(
            all(0 <= level < len(self.channel_multipliers) for level in self.attention_levels),
            f"Expected VQGANConfig.attention_levels in [0, {len(self.channel_multipliers)}), "
            f"got {self.attention_levels}.",
        )
        require_at_least(self, 0, "pixel_weight", "perceptual_weight")

    @property
    def vocab(self) -> int:
        return self.quantizer.vocab

    @property
    def restarts_dead_codes(self) -> bool:
        """Whether training reinitializes unused codes."""
        return isinstance(self.quantizer, VectorQuantizer) and self.quantizer.dead_code_restart_steps > 0

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Side of the square of codes."""
        return self.image_size // self.downsample

    @property
    def num_codes(self) -> int:
        return self.grid**2


TokenizerConfig = DVAEConfig | VQGANConfig
