"""Schedules that need not preserve the variance, with Eq. (1) of ``schedule.base``:

    (5)  rectified flow, data at 0:   alpha = 1 - t,  sigma = s + (1 - s) t,  s = sigma_min   (Movie Gen; s = 0: Liu)
    (6)  TrigFlow:                    alpha = cos(pi t / 2),  sigma = sigma_data sin(pi t / 2)
    (7)  variance exploding:          alpha = 1,  sigma from sigma_min at t = 0 to sigma_max at t = 1

The noise of a chain begins with std sigma(1): 1 in (5), sigma_data in (6), sigma_max in (7).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.schedule.base import Level


@dataclass(frozen=True)
class Rectified:
    """Rectified flow (Liu et al. 2022; handbook 2.4), Eq. (5).

    ``sigma_min`` in [0, 1) is the noise that the data keep at t = 0 (Movie Gen: 1e-5; handbook 3.1.3 at time 1 - t).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ConfigError(f"sigma_min = {self.sigma_min}: expected 0 <= sigma_min < 1")

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        one, rate = torch.ones_like(t), 1 - self.sigma_min
        return Level(1 - t, self.sigma_min + rate * t, -one, rate * one)


@dataclass(frozen=True)
class Trig:
    """TrigFlow (Lu & Song 2024; handbook 2.5), Eq. (6): their z is sigma_data eps, their time pi t / 2."""

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise ConfigError(f"sigma_data = {self.sigma_data}: expected a number > 0")

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        rate, sd = math.pi / 2, self.sigma_data
        cos, sin = (t * rate).cos().where(t != 1, torch.zeros_like(t)), (t * rate).sin()
        return Level(cos, sd * sin, -rate * sin, sd * rate * cos)


def _check_sigmas(schedule: "Karras | Geometric") -> None:
    if not 0 < schedule.sigma_min < schedule.sigma_max < math.inf:
        raise ConfigError(f"{schedule}: expected 0 < sigma_min < sigma_max")


@dataclass(frozen=True)
class Karras:
    """The noise levels of EDM (Karras et al. 2022, Eq. 5) and consistency models (handbook 2.3), Eq. (7):

    sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho. An even grid in t is their grid.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check_sigmas(self)
        if not 0 < self.rho < math.inf:
            raise ConfigError(f"rho = {self.rho}: expected a number > 0")

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        root, one = low + t * (high - low), torch.ones_like(t)
        return Level(one, root**self.rho, 0 * one, self.rho * (high - low) * root ** (self.rho - 1))


@dataclass(frozen=True)
class Geometric:
    """The geometric noise levels of NCSN and the VE-SDE (Song & Ermon 2019; Song et al. 2021, Eq. 30), Eq. (7):

    sigma(t) = sigma_min (sigma_max / sigma_min)^t.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _check_sigmas(self)

    @property
    def resolution(self) -> None:
        return None

    def __call__(self, t: Tensor) -> Level:
        rate, one = math.log(self.sigma_max / self.sigma_min), torch.ones_like(t)
        sigma = self.sigma_min * (t * rate).exp()
        return Level(one, sigma, 0 * one, rate * sigma)
