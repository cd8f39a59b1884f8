"""Schedules of pretrained models' samplers: a table of betas (Eq. (1) to (4) of ``schedule.vp``) and its ends.

(8)  squared cosine, capped (Nichol & Dhariwal 2021, as diffusers has it): 1 - beta_k = f(k / T) / f((k - 1) / T), at
     least 1 - max_beta, f(t) = cos^2((t + 0.008) / 1.008 pi / 2)
(9)  between two times of a table, k - 1 < T t < k, u = sigma / alpha linear in t ("sigma"), or log u ("log_sigma")
(10) a chain begins with N(0, I), though sigma(t_0) is a little below 1: what the samplers of DDPM tables do
(11) x0 + u eps scaled to preserve the variance:  alpha = 1 / sqrt(1 + u^2),  sigma = u alpha
(12) SNR divided by ``scale`` (Hoogeboom et al. 2023; CogVideoX): Eq. (11), u = sqrt(scale) sigma / alpha of a table
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.diffusion.schedule.base import Level, Schedule
from rlfusion.diffusion.schedule.vp import DDPM, ScaledLinear, _from_table, _table


def _preserved(u: Tensor, slope: Tensor) -> Level:
    """Eq. (11), ``slope`` = du / dt."""
    alpha = (1 + u.square()).rsqrt()
    return Level(alpha, u * alpha, -u * slope * alpha**3, slope * alpha**3)


@dataclass(frozen=True)
class SquaredCosine:
    """Eq. (8), T = ``resolution``."""

    resolution: int = 1000
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        if not 1 <= self.resolution <= 1_000_000 or not 0 < self.max_beta < 1:
            raise ConfigError(f"{self}: expected 1 <= resolution <= 1e6 and 0 < max_beta < 1")

    @cached_property
    def log_ab(self) -> Tensor:
        """log alpha_bar at k / T, (T+1,), float64; entry 0 is 0."""
        t = torch.linspace(0, 1, self.resolution + 1, dtype=torch.float64)
        f = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
        return _table((1 - f[1:] / f[:-1]).clamp(max=self.max_beta))

    def __call__(self, t: Tensor) -> Level:
        return _from_table(self.log_ab, t)


@dataclass(frozen=True)
class Between:
    """Eq. (9) on the table ``base``, from its first time 1 / T up; below it, and at its times, ``base`` itself."""

    base: Schedule
    linear: Literal["sigma", "log_sigma"]

    @property
    def resolution(self) -> int | None:
        return self.base.resolution

    def __call__(self, t: Tensor) -> Level:
        steps = self.base.resolution
        assert steps is not None  # of a table
        k = t * steps
        lower = k.floor().clamp(1, max(1, steps - 1))
        ends = [self.base(end / steps) for end in (lower, lower + 1)]
        low, high = (end.sigma / end.alpha for end in ends)
        if self.linear == "sigma":
            u, slope = low + (k - lower) * (high - low), high - low
        else:
            u = low * (high / low) ** (k - lower)
            slope = u * (high / low).log()
        made = _preserved(u, slope * steps)
        whole = ((k - k.round()).abs() < 1e-6) | (k < 1)
        return Level(*(torch.where(whole, held, new) for held, new in zip(self.base(t), made)))


@dataclass(frozen=True)
class Power:
    """Eq. (11) with u = sigma_max t^rho: the noise levels of EDM (Karras et al. 2022), down to none at t = 0."""

    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        require_positive(self, "sigma_max", "rho")

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        return _preserved(self.sigma_max * t**self.rho, self.sigma_max * self.rho * t ** (self.rho - 1))


@dataclass(frozen=True)
class ShiftedSNR:
    """Eq. (12) of the table that ``base`` writes: DDPM(...), ScaledLinear(...) or SquaredCosine(...)."""

    base: str = "ScaledLinear()"
    scale: float = 3.0

    def __post_init__(self) -> None:
        require_positive(self, "scale")
        _ = self.schedule

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule that ``base`` writes."""
        return spec.parse(self.base, TABLES, "table of betas")

    @property
    def resolution(self) -> int | None:
        return self.schedule.resolution

    def __call__(self, t: Tensor) -> Level:
        l, root = self.schedule(t), math.sqrt(self.scale)
        return _preserved(root * l.sigma / l.alpha, root * l.d_sigma / l.alpha**3)  # du = d_sigma / alpha^3 as VP


TABLES = {"DDPM": DDPM, "ScaledLinear": ScaledLinear, "SquaredCosine": SquaredCosine}
"""The tables of betas, by name."""


@dataclass(frozen=True)
class UnitPrior:
    """Eq. (10) for the schedule ``base``."""

    base: Schedule

    @property
    def resolution(self) -> int | None:
        return self.base.resolution

    def __call__(self, t: Tensor) -> Level:
        return self.base(t)


def prior_std(schedule: Schedule, times: Tensor) -> float:
    """The standard deviation of the noise where a chain over ``times`` (K+1,) begins: sigma(t_0), or Eq. (10)."""
    return 1.0 if isinstance(schedule, UnitPrior) else float(schedule(times[:1]).sigma)
