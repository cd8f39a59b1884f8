"""Noise schedules: what a time means.

    (1)  x_t = alpha(t) x_0 + sigma(t) eps,     eps ~ N(0, I),     t = 0 is data and t = 1 is noise.
    (2)  variance preserving (VP):  alpha = sqrt(ab), sigma = sqrt(1 - ab), ab = alpha_bar, ab(0) = 1
    (3)  a DDPM table:  ab_k = prod_{i<=k} (1 - beta_i) at t = k / T, k = 0..T; between two entries log ab is linear,
         so that d log ab / dt = T log(1 - beta_k) on ((k-1)/T, k/T]
    (4)  alpha' = alpha (log ab)' / 2,    sigma' = -ab (log ab)' / (2 sigma)

Times are float64 tensors on the CPU: the coefficients of every step are made there, in float64, and cast last (see
``Level.like``). A time is a scalar () shared by the batch, or (B,).
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlfusion.errors import ConfigError


class Level(NamedTuple):
    """What a schedule says at one time: alpha, sigma of Eq. (1) and their derivatives in t, float64."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Schedule(Protocol):
    """A frozen dataclass that maps times in [0, 1], any shape, to a ``Level`` of that shape."""

    @property
    def resolution(self) -> int | None:
        """The number T of discrete times k / T that exist, or None for continuous time."""

    def __call__(self, t: Tensor) -> Level: ...


def level(schedule: Schedule, t: Tensor, like: Tensor) -> Level:
    """The level at ``t`` () or (B,), shaped to act on ``like`` (B, ...): the one place where a time broadcasts.

    Raises:
        ValueError: a time outside [0, 1], or of a shape that is neither () nor (B,).
    """
    if t.ndim == 0:
        return _at(schedule, t.item())
    t = t.double()
    if t.ndim == 1 and len(t) in (1, len(like)):
        t = t.reshape(-1, *[1] * (like.ndim - 1))
    else:
        raise ValueError(f"times are () or (B,): got {tuple(t.shape)} for a batch {tuple(like.shape)}")
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"times lie in [0, 1]: got {t.min().item():g} to {t.max().item():g}")
    return schedule(t)


@lru_cache(maxsize=4096)
def _at(schedule: Schedule, t: float) -> Level:
    """The level of a time that a whole batch shares: the same few in every rollout."""
    if not 0 <= t <= 1:
        raise ValueError(f"times lie in [0, 1]: got {t:g}")
    return schedule(torch.tensor(t, dtype=torch.float64))


def _from_log_ab(log_ab: Tensor, d_log_ab: Tensor) -> Level:
    """Eq. (4). At ab = 1 the derivative of sigma is infinite."""
    alpha, sigma = (log_ab / 2).exp(), (0 - torch.expm1(log_ab)).sqrt()  # 0 - x: no -0 at t = 0
    return Level(alpha, sigma, alpha * d_log_ab / 2, -log_ab.exp() * d_log_ab / (2 * sigma))


@dataclass(frozen=True)
class DDPM:
    """The linear beta table of DDPM (Ho et al. 2020, section 4; handbook 2.2): Eq. (3), T = ``resolution``.

    ``beta_start`` and ``beta_end`` are the first and last beta, in (0, 1).
    """

    resolution: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.resolution < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(f"{self}: expected resolution >= 1 and 0 < beta_start <= beta_end < 1")

    @cached_property
    def log_ab(self) -> Tensor:
        """log alpha_bar at k / T, (T+1,), float64; entry 0 is 0."""
        beta = torch.linspace(self.beta_start, self.beta_end, self.resolution, dtype=torch.float64)
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-beta).cumsum(0)])

    def __call__(self, t: Tensor) -> Level:
        table = self.log_ab.to(t.device)
        k = t * self.resolution
        k = torch.where((k - k.round()).abs() < 1e-6, k.round(), k)  # k / T * T is not k in floating point
        upper = k.ceil().long().clamp(1, self.resolution)
        slope = table[upper] - table[upper - 1]
        return _from_log_ab(table[upper] + (k - upper) * slope, slope * self.resolution)


@dataclass(frozen=True)
class Cosine:
    """The cosine schedule in continuous time (Nichol & Dhariwal 2021, Eq. 17; handbook 5):

    alpha(t) = cos(phi(t)) / cos(phi(0)),  phi(t) = (t + offset) / (1 + offset) * pi / 2.  alpha(1) = 0 exactly (zero
    terminal SNR), so a network on it predicts x0 or v, not eps.
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        if not isinstance(self.offset, int | float) or not 0 <= self.offset < 1:
            raise ConfigError(f"offset = {self.offset!r}: expected a number in [0, 1)")

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        rate = math.pi / 2 / (1 + self.offset)
        phi, scale = (t + self.offset) * rate, 1 / math.cos(self.offset * rate)
        alpha = torch.where(t == 1, torch.zeros_like(t), phi.cos() * scale)
        # sin^2(phi - phi0) form of 1 - alpha^2: exact near t = 0, where 1 - alpha^2 would cancel
        sigma = (((t * rate).sin() * (phi + self.offset * rate).sin()).sqrt() * scale).where(t != 1, torch.ones_like(t))
        d_alpha = -rate * scale * phi.sin()
        return Level(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


@dataclass(frozen=True)
class Rectified:
    """Rectified flow (Liu et al. 2022; handbook 2.4): alpha = 1 - t, sigma = t."""

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        one = torch.ones_like(t)
        return Level(1 - t, t, -one, one)


@dataclass(frozen=True)
class Trig:
    """TrigFlow (Lu & Song 2024; handbook 2.5) with sigma_data = 1: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        rate = math.pi / 2
        cos, sin = (t * rate).cos().where(t != 1, torch.zeros_like(t)), (t * rate).sin()
        return Level(cos, sin, -rate * sin, rate * cos)
