"""What samplers of pretrained models add to a table of betas, with Eq. (1) to (4) of ``schedule.vp``.

(8)  squared cosine, capped (Nichol & Dhariwal 2021, as diffusers has it): 1 - beta_k = f(k / T) / f((k - 1) / T), at
     least 1 - max_beta, f(t) = cos^2((t + 0.008) / 1.008 pi / 2)
(9)  between two times of a table, k - 1 < T t < k, u = sigma / alpha linear in t ("sigma"), or log u ("log_sigma")
(10) a chain begins with N(0, I), though sigma(t_0) is a little below 1: what the samplers of DDPM tables do
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rlfusion.errors import ConfigError
from rlfusion.schedule.base import Level, Schedule
from rlfusion.schedule.vp import _from_table, _table


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
        k = t * self.resolution
        lower = k.floor().clamp(1, max(1, self.resolution - 1))
        ends = [self.base(end / self.resolution) for end in (lower, lower + 1)]
        low, high = (end.sigma / end.alpha for end in ends)
        if self.linear == "sigma":
            u, slope = low + (k - lower) * (high - low), high - low
        else:
            u = low * (high / low) ** (k - lower)
            slope = u * (high / low).log()
        alpha, slope = (1 + u.square()).rsqrt(), slope * self.resolution
        made = Level(alpha, u * alpha, -u * slope * alpha**3, slope * alpha**3)
        whole = ((k - k.round()).abs() < 1e-6) | (k < 1)
        return Level(*(torch.where(whole, held, new) for held, new in zip(self.base(t), made)))


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
