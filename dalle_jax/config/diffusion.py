"""Diffusion: the noise schedule and what a network predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_jax.config.checks import require

NoiseKind = Literal["linear", "cosine", "ddpm", "ve", "edm"]
Prediction = Literal["eps", "x0", "v", "score"]
Weighting = Literal["simple", "min_snr", "likelihood"]


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How noise grows with time t in [0, 1]: x_t = alpha(t) x_0 + sigma(t) eps.

    linear, cosine, ddpm keep the variance (alpha^2 + sigma^2 = 1); ve and edm let it explode (alpha = 1).
    """

    kind: NoiseKind = "linear"
    beta_min: float = 0.1  # linear, ddpm: beta(0) per unit of t; 2011.13456, C
    beta_max: float = 20.0  # linear, ddpm: beta(1) per unit of t; 2011.13456, C
    steps: int = 1000  # ddpm: discrete steps; betas from beta_min / steps to beta_max / steps; 2006.11239, 4
    sigma_min: float = 0.01  # ve 0.01 (2011.13456, C), edm 0.002 (2206.00364, table 1)
    sigma_max: float = 50.0  # ve 50 (2011.13456, C), edm 80 (2206.00364, table 1)
    rho: float = 7.0  # edm: exponent of the spacing of sigma over t; 2206.00364, eq. 5
    zero_terminal_snr: bool = False  # no signal at all at t = 1; 2305.08891, 3.1
    t_min: float = 1e-3  # least time that is trained on and sampled from; the last step jumps from it to 0

    def __post_init__(self):
        require(
            0 < self.beta_min < self.beta_max,
            f"noise betas {self.beta_min}..{self.beta_max}; want 0 < beta_min < beta_max",
        )
        require(
            0 < self.sigma_min < self.sigma_max,
            f"noise sigmas {self.sigma_min}..{self.sigma_max}; want 0 < sigma_min < sigma_max",
        )
        require(
            self.steps >= 2 and self.beta_max < self.steps,
            f"noise.steps is {self.steps}; want at least 2, and more than beta_max {self.beta_max}",
        )
        require(self.rho >= 1, f"noise.rho is {self.rho}; want at least 1")
        require(0 < self.t_min < 1, f"noise.t_min is {self.t_min}; want a time in (0, 1)")
        require(
            not (self.zero_terminal_snr and self.kind in ("ve", "edm")),
            f"zero_terminal_snr is for schedules that keep the variance, not for {self.kind}; turn it off",
        )
