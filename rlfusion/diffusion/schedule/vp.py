"""Variance-preserving schedules, with Eq. (1) of ``schedule.base``:

(2)  alpha = sqrt(ab), sigma = sqrt(1 - ab), ab = alpha_bar, ab(0) = 1
(3)  a DDPM table:  ab_k = prod_{i<=k} (1 - beta_i) at t = k / T, k = 0..T; between two entries log ab is linear,
     so that d log ab / dt = T log(1 - beta_k) on ((k-1)/T, k/T]
(4)  alpha' = alpha (log ab)' / 2,    sigma' = -ab (log ab)' / (2 sigma)
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.schedule.base import Level


def _from_log_ab(log_ab: Tensor, d_log_ab: Tensor) -> Level:
    """Eq. (4). At ab = 1 the derivative of sigma is infinite."""
    alpha, sigma = (log_ab / 2).exp(), (0 - torch.expm1(log_ab)).sqrt()  # 0 - x: no -0 at t = 0
    return Level(alpha, sigma, alpha * d_log_ab / 2, -log_ab.exp() * d_log_ab / (2 * sigma))


def _from_table(log_ab: Tensor, t: Tensor) -> Level:
    """Eq. (3) of a table (T+1,) of log ab, at times of any shape."""
    table, last = log_ab.to(t.device), len(log_ab) - 1
    k = t * last
    k = torch.where((k - k.round()).abs() < 1e-6, k.round(), k)  # k / T * T is not k in floating point
    upper = k.ceil().long().clamp(1, last)
    slope = table[upper] - table[upper - 1]
    return _from_log_ab(table[upper] + (k - upper) * slope, slope * last)


def _table(beta: Tensor) -> Tensor:
    """log alpha_bar at k / T, (T+1,), float64; entry 0 is 0."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-beta).cumsum(0)])


def _check_table(table: "DDPM | ScaledLinear") -> None:
    if not 1 <= table.resolution <= 1_000_000 or not 0 < table.beta_start <= table.beta_end < 1:
        raise ConfigError(f"{table}: expected 1 <= resolution <= 1e6 and 0 < beta_start <= beta_end < 1")


@dataclass(frozen=True)
class DDPM:
    """The linear beta table of DDPM (Ho et al. 2020, section 4; handbook 2.2): Eq. (3), T = ``resolution``.

    ``beta_start`` and ``beta_end`` are the first and last beta, in (0, 1).
    """

    resolution: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        _check_table(self)

    @cached_property
    def log_ab(self) -> Tensor:
        """log alpha_bar at k / T, (T+1,), float64; entry 0 is 0."""
        return _table(torch.linspace(self.beta_start, self.beta_end, self.resolution, dtype=torch.float64))

    def __call__(self, t: Tensor) -> Level:
        return _from_table(self.log_ab, t)


@dataclass(frozen=True)
class ScaledLinear:
    """The table of latent diffusion (Rombach et al. 2022; Stable Diffusion): sqrt(beta) is linear in k. Eq. (3)."""

    resolution: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        _check_table(self)

    @cached_property
    def log_ab(self) -> Tensor:
        """log alpha_bar at k / T, (T+1,), float64; entry 0 is 0."""
        first, last = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        return _table(torch.linspace(first, last, self.resolution, dtype=torch.float64).square())

    def __call__(self, t: Tensor) -> Level:
        return _from_table(self.log_ab, t)


@dataclass(frozen=True)
class VP:
    """The VP-SDE dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw (Song et al. 2021, Eq. 11, 32; handbook 2.1):

    beta(t) = beta_min + t (beta_max - beta_min),  log ab(t) = -t beta_min - t^2 (beta_max - beta_min) / 2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ConfigError(f"{self}: expected 0 < beta_min <= beta_max")

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        rise = self.beta_max - self.beta_min
        return _from_log_ab(-t * self.beta_min - t.square() * rise / 2, -(self.beta_min + t * rise))


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
        end = t == 1
        alpha = (phi.cos() * scale).masked_fill(end, 0)
        # sin^2(phi - phi0) form of 1 - alpha^2: exact near t = 0, where 1 - alpha^2 would cancel
        sigma = (((t * rate).sin() * (phi + self.offset * rate).sin()).sqrt() * scale).masked_fill(end, 1)
        d_alpha = -rate * scale * phi.sin()
        return Level(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)
