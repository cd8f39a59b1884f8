"""Weights of the noise levels: of the x0 error, from which the weights of every kind of prediction follow.

    (1)  |x_0 - x_0hat|^2 = (sigma / det)^2 |y - y_theta|^2,     det = alpha b - sigma a
    (2)  a weight w on the x0 error is the weight w (sigma / det)^2 on the network's own error

With SNR = alpha^2 / sigma^2, w = SNR is the eps error, w = SNR + 1 the v error; a score network under w = SNR has the
weight sigma^2 of NCSN (Song & Ermon 2019, Eq. 6; handbook 2.2.2).

The variational bound (Ho et al. 2020, Eq. 5, 8; handbook 2.2.2, errata 15-17) has, for a step t -> s of the DDPM chain,

    (3)  L_s = KL(q(x_s | x_t, x0) || p(x_s | x_t)) = (SNR(s) - SNR(t)) / 2 |x_0 - x_0hat|^2       (Kingma et al. 2021)

so with ever finer steps w = -SNR'(t) / 2, in nats: alpha (alpha sigma' - alpha' sigma) / sigma^3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.diffusion.kinds import Kind
from rlfusion.diffusion.parameterization import solve
from rlfusion.diffusion.schedule import Level


class Weight(Protocol):
    """A frozen dataclass: the weight of the network's own squared error at a level, float64."""

    def __call__(self, kind: str | Kind, l: Level) -> Tensor: ...


@dataclass(frozen=True)
class Own:
    """1 on the network's own error: the plain loss of every kind."""

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return torch.ones_like(l.alpha)


@dataclass(frozen=True)
class SNR:
    """w = SNR: the eps error, "simple" in Ho et al. 2020, whatever the network predicts."""

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return _own(kind, l, _snr(l))


@dataclass(frozen=True)
class Score:
    """w = SNR / sigma^2: the score error, unweighted. It grows as 1 / sigma^2 over the eps error towards clean data."""

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return _own(kind, l, _snr(l) / l.sigma.square())


@dataclass(frozen=True)
class TruncatedSNR:
    """w = max(SNR, 1) (Salimans & Ho 2022, section 4): the larger of the x0 and the eps error."""

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return _own(kind, l, _snr(l).clamp(min=1))


@dataclass(frozen=True)
class SNRPlusOne:
    """w = SNR + 1 (Salimans & Ho 2022, section 4): on a VP schedule the v error."""

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return _own(kind, l, _snr(l) + 1)


@dataclass(frozen=True)
class MinSNR:
    """w = min(SNR, gamma) (Hang et al. 2023, Eq. 6)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        require_positive(self, "gamma")

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return _own(kind, l, _snr(l).clamp(max=self.gamma))


@dataclass(frozen=True)
class BoundedSNR:
    """w = SNR, held in [low, high]: like truncated SNR at high noise, and no more than ``high`` at low noise."""

    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ConfigError(f"low = {self.low}, high = {self.high}: expected 0 < low <= high")

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return _own(kind, l, _snr(l).clamp(self.low, self.high))


@dataclass(frozen=True)
class VLB:
    """w = -SNR' / 2, Eq. (3): with uniform times the loss is the diffusion part of the bound in nats per dimension.

    Near clean data it grows as 1 / t or faster: the times' margin ends it where L_0, the decoder, takes over.
    """

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return _own(kind, l, l.alpha * (l.alpha * l.d_sigma - l.d_alpha * l.sigma) / l.sigma**3)


@dataclass(frozen=True)
class RectifiedFlow:
    """w = SNR min(((alpha + sigma) / alpha)^2, cap): the error in u = x0 - eps of a network that is read as a rectified
    flow in y = x / (alpha + sigma) (handbook 2.4.5, errata 48-52), whose weight on the eps error has no bound without
    the cap as alpha -> 0.
    """

    cap: float = 100.0

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise ConfigError(f"cap = {self.cap}: expected a number >= 1, the weight at clean data")

    def __call__(self, kind: str | Kind, l: Level) -> Tensor:
        return _own(kind, l, _snr(l) * ((l.alpha + l.sigma) / l.alpha).square().clamp(max=self.cap))


def _snr(l: Level) -> Tensor:
    return (l.alpha / l.sigma).square()


def _own(kind: str | Kind, l: Level, weight: Tensor) -> Tensor:
    """Eq. (2): x0_y of the solution is -sigma / det."""
    return weight * solve(kind, l).x0_y.square()


WEIGHTS: Mapping[str, Callable[..., Weight]] = {
    cls.__name__: cls for cls in (Own, SNR, Score, TruncatedSNR, SNRPlusOne, MinSNR, BoundedSNR, VLB, RectifiedFlow)
}
