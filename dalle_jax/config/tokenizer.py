"""Image tokenizers: sizes of the network and the schedules of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_jax.config.checks import require

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Half-cosine from `start` to `end` over `steps` updates, constant afterwards (2102.12092, A.2)."""

    start: float
    end: float
    steps: int  # updates; 0 means `end` from the beginning

    def __post_init__(self):
        require(self.steps >= 0, f"Schedule.steps is {self.steps}; want 0 or more updates")


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
            require(getattr(self, name) >= 1, f"DVAEConfig.{name} is {getattr(self, name)}; want at least 1")
        require(
            self.image_size % self.downsample == 0,
            f"image_size {self.image_size} is not divisible by {self.downsample} (= 2**(groups-1) with "
            f"groups={self.groups}); change image_size or groups",
        )
        require(self.width % 4 == 0, f"DVAEConfig.width is {self.width}; want a multiple of 4 (bottleneck)")
        require(self.min_scale >= 0, f"DVAEConfig.min_scale is {self.min_scale}; want 0 (none) or more")
        for s in (self.tau.start, self.tau.end):
            require(s > 0, f"DVAEConfig.tau must stay positive, got {self.tau}")

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
