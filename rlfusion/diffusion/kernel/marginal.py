"""Kernels with A = alpha_s (Eq. (1) of ``kernel.base``) and, but for the large variance, B^2 + S^2 = sigma_s^2.

(2)  r = alpha_t sigma_s / (alpha_s sigma_t),     DDPM posterior:  B = r sigma_s,  small S^2 = sigma_s^2 (1 - r^2),
     large S^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2           (handbook Eq. 8-10; = 1 - ab_t / ab_s for VP)
(3)  DDIM(eta):  S = eta sigma_s sqrt(1 - r^2),  B = sqrt(sigma_s^2 - S^2)                       (handbook Eq. 14)
(4)  re-noise:  B = 0,  S^2 = sigma_s^2 - floor^2        (handbook Eq. 26, 27, Alg. 4, 5, 7, 9, all corrected)
(5)  coefficients preserved (Wang & Yu 2025):  B = sigma_s cos(pi eta / 2),  S = sigma_s sin(pi eta / 2)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.diffusion.kernel.base import Coefficients
from rlfusion.diffusion.schedule import Level


def _ratio(t: Level, s: Level) -> Tensor:
    """r of Eq. (2), in [0, 1]."""
    return t.alpha * s.sigma / (s.alpha * t.sigma)


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling, Eq. (2) (Ho et al. 2020; handbook Alg. 1, 2 corrected).

    ``variance``: "small" is the posterior's (exact for a point mass), "large" is beta's (exact for N(0, I) data).
    """

    variance: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise unknown("variance", str(self.variance), ["small", "large"])

    @property
    def stochastic(self) -> bool:
        return True

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        r = _ratio(t, s)
        small = s.sigma * (1 - r.square()).clamp(min=0).sqrt()
        large = (t.sigma.square() - (t.alpha / s.alpha * s.sigma).square()).clamp(min=0).sqrt()
        std = torch.where(s.sigma > 0, large, 0.0) if self.variance == "large" else small
        return Coefficients(s.alpha, r * s.sigma, std)


@dataclass(frozen=True)
class DDIM:
    """DDIM(eta), Eq. (3) (Song et al. 2020, Eq. 12, 16; handbook Alg. 3), on any subsequence of times.

    eta = 0 is the deterministic ODE step, eta = 1 the DDPM posterior with the small variance. eta > 1 is legal while
    S <= sigma_s, that is up to eta_max = 1 / sqrt(1 - r^2) of each step; more raises ConfigError.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ConfigError(f"eta = {self.eta}: expected a number >= 0")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        std = self.eta * s.sigma * (1 - _ratio(t, s).square()).clamp(min=0).sqrt()
        left = s.sigma.square() - std.square()
        if left.device.type == "cpu" and bool((left < -1e-9).any()):
            most = (1 - _ratio(t, s).square()).rsqrt().min().item()
            raise ConfigError(f"eta = {self.eta}: expected at most eta_max = {most:.4f} for this step of the time grid")
        return Coefficients(s.alpha, left.clamp(min=0).sqrt(), std)


@dataclass(frozen=True)
class Renoise:
    """Jump to x0_hat and noise it afresh, Eq. (4): LCM, consistency models, DMD, one-step InstaFlow.

    It suits a consistency function or a distilled generator. With a diffusion denoiser and many steps the variance of
    the samples tends to half that of the data. ``floor`` is the noise that x0_hat itself has: t_min of a consistency
    model on a variance-exploding path (Alg. 4), else 0. The step to a level of sigma = floor has no noise.
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.floor >= 0:
            raise ConfigError(f"floor = {self.floor}: expected a number >= 0")

    @property
    def stochastic(self) -> bool:
        return True

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        left = s.sigma.square() - self.floor**2
        left = torch.where(left.abs() <= 1e-9 * s.sigma.square(), 0.0, left)  # sigma(0) is t_min up to rounding
        if left.device.type == "cpu" and bool((left < 0).any()):
            raise ConfigError(
                f"floor = {self.floor}: expected at most sigma = {s.sigma.min().item():g} of the last time"
            )
        return Coefficients(s.alpha, torch.zeros_like(s.sigma), left.sqrt())


@dataclass(frozen=True)
class CPS:
    """Coefficient-preserving sampling, Eq. (5): the share of noise in x_s is right at any gap and any eta in [0, 1].

    eta = 0 is DDIM(0), eta = 1 the re-noise step.
    """

    eta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta = {self.eta}: expected 0 <= eta <= 1")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        angle = self.eta * math.pi / 2
        return Coefficients(s.alpha, s.sigma * math.cos(angle), s.sigma * math.sin(angle))
