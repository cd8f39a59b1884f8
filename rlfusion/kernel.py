"""Reverse transitions t -> s as three numbers (A, B, S) of the schedule alone:

    (1)  p(x_s | x_t) = N(A x0_hat + B eps_hat, S^2 I).

A kernel with A = alpha_s and B^2 + S^2 = sigma_s^2 keeps the marginals of ``schedule`` when (x0, eps) are exact.
Where sigma_s = 0 every kernel returns x0_hat itself (A = alpha_s, B = S = 0): the last step is deterministic.

    (2)  r = alpha_t sigma_s / (alpha_s sigma_t),     DDPM posterior:  B = r sigma_s,  small S^2 = sigma_s^2 (1 - r^2),
         large S^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2           (handbook Eq. 8-10; = 1 - ab_t / ab_s for VP)
    (3)  DDIM(eta):  S = eta sigma_s sqrt(1 - r^2),  B = sqrt(sigma_s^2 - S^2)                       (handbook Eq. 14)
    (4)  reverse SDE, one Euler-Maruyama step, dt = s - t < 0, g^2 = noise^2 sigma / alpha (Flow-GRPO, Liu et al. 2025):
         A = alpha_t + alpha_t' dt,  B = sigma_t + (sigma_t' + g^2 / (2 sigma_t)) dt,  S = g sqrt(-dt)
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlfusion.errors import ConfigError, unknown
from rlfusion.gaussian import Gaussian
from rlfusion.parameterization import Prediction
from rlfusion.schedule import Level
from rlfusion.tensors import cast


class Coefficients(NamedTuple):
    """A, B and S of Eq. (1), float64, shaped as the levels are."""

    x0: Tensor
    eps: Tensor
    std: Tensor


class Kernel(Protocol):
    """A frozen dataclass that gives the coefficients of the step from level ``t`` to ``s``, ``dt`` = s - t < 0."""

    @property
    def stochastic(self) -> bool:
        """False if S = 0 at every step: such a kernel has no log-probability and trains no policy gradient."""

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients: ...


def transition(kernel: Kernel, p: Prediction, t: Level, s: Level, dt: Tensor) -> Gaussian:
    """Eq. (1), with the kernel's coefficients of the step."""
    return apply(kernel.coefficients(t, s, dt), p)


def apply(coefficients: Coefficients, p: Prediction) -> Gaussian:
    """Eq. (1). Coefficients are float64, and are cast to the prediction's dtype and device here, last."""
    a, b, std = coefficients
    return Gaussian(cast(a, p.x0) * p.x0 + cast(b, p.eps) * p.eps, cast(std, p.x0))


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
class FlowSDE:
    """The stochastic flow sampler of Flow-GRPO, Eq. (4), for any schedule with alpha > 0 below t = 1.

    At t = 1, where alpha = 0, the noise scale uses alpha_s, as the released code does. ``noise`` = 0 is the Euler step
    of the flow ODE.
    """

    noise: float = 0.7

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise ConfigError(f"noise = {self.noise}: expected a number >= 0")

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        alpha = torch.where(t.alpha > 0, t.alpha, s.alpha)
        g2 = self.noise**2 * t.sigma / alpha
        last = s.sigma == 0
        a = torch.where(last, s.alpha, t.alpha + t.d_alpha * dt)
        b = torch.where(last, 0.0, t.sigma + (t.d_sigma + g2 / (2 * t.sigma)) * dt)
        return Coefficients(a, b, torch.where(last, 0.0, (g2 * -dt).sqrt()))
