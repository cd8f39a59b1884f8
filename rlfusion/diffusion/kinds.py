"""Kinds of prediction: what a network reads and what it answers.

With Eq. (1) of ``schedule``, x_t = alpha x_0 + sigma eps, a kind is a row (a, b), an input scale and a time:

    (1)  y = net(c_in x_t, c_noise),     y = a x_0 + b eps
    (2)  x_0 = (b x_t - sigma y) / det,     eps = (alpha y - a x_t) / det,     det = alpha b - sigma a

The handbook's velocities (2.4.5, 2.6, 3.1): v = sigma x0 - alpha eps ("v_handbook"), InstaFlow's u = x0 - eps in
y = x / (alpha + sigma), TrigFlow's V = cos t z - sin t x0. EDM and consistency models are written for x_0 + tau eps;
on any path they read x_t / alpha at tau = sigma / alpha.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.schedule import Level


class Solution(NamedTuple):
    """The coefficients of Eq. (2), float64: x0 = x0_x x_t + x0_y y, eps = eps_x x_t + eps_y y."""

    x0_x: Tensor
    x0_y: Tensor
    eps_x: Tensor
    eps_y: Tensor


class Kind(Protocol):
    """A frozen dataclass of Eq. (1). Levels and times are float64; what is not defined comes out as inf or NaN."""

    def row(self, l: Level) -> tuple[Tensor, Tensor]:
        """(a, b)."""

    def solution(self, l: Level) -> Solution:
        """Eq. (2)."""

    def scale(self, l: Level) -> Tensor:
        """c_in."""

    def time(self, t: Tensor, l: Level) -> Tensor:
        """c_noise: the network's time at ``t``."""

    def __hash__(self) -> int: ...


def invert(row: tuple[Tensor, Tensor], l: Level) -> Solution:
    """Eq. (2)."""
    a, b = row
    det = l.alpha * b - l.sigma * a
    return Solution(b / det, -l.sigma / det, -a / det, l.alpha / det)


@dataclass(frozen=True)
class Plain:
    """A kind that is a row alone: the network reads x_t and t."""

    row: Callable[[Level], tuple[Tensor, Tensor]]

    def solution(self, l: Level) -> Solution:
        return invert(self.row(l), l)

    def scale(self, l: Level) -> Tensor:
        return torch.ones_like(l.alpha)

    def time(self, t: Tensor, l: Level) -> Tensor:
        return t


@dataclass(frozen=True)
class Timed:
    """A kind whose network counts time in its own units: rate c_noise + offset (k - 1 of a table: T, -1).

    ``whole`` says that it gets whole numbers, and how: "round" or "floor" (up to 1e-5, for rounding); "" is neither.
    """

    kind: Kind
    rate: float
    offset: float = 0.0
    whole: Literal["", "round", "floor"] = ""

    def row(self, l: Level) -> tuple[Tensor, Tensor]:
        return self.kind.row(l)

    def solution(self, l: Level) -> Solution:
        return self.kind.solution(l)

    def scale(self, l: Level) -> Tensor:
        return self.kind.scale(l)

    def time(self, t: Tensor, l: Level) -> Tensor:
        time = self.rate * self.kind.time(t, l) + self.offset
        whole = {"": lambda: time, "round": time.round, "floor": (time + 1e-5).floor}
        return whole[self.whole]()


@dataclass(frozen=True)
class InstaFlow:
    """u = x0 - eps, read in the rescaled space y = x / (alpha + sigma) (Liu et al. 2023; handbook 2.4.3, Eq. 30).

    There y = (1 - r) x0 + r eps with r = sigma / (alpha + sigma): a rectified flow, whose time r the network gets.
    """

    def row(self, l: Level) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(l.alpha)
        return one, -one

    def solution(self, l: Level) -> Solution:
        return invert(self.row(l), l)

    def scale(self, l: Level) -> Tensor:
        return 1 / (l.alpha + l.sigma)

    def time(self, t: Tensor, l: Level) -> Tensor:
        return l.sigma / (l.alpha + l.sigma)


@dataclass(frozen=True)
class TrigFlow:
    """F = V / sigma_data, V = cos z - sin x0 (Lu & Song 2024; handbook 2.5), on the schedule Trig(sigma_data).

    The network reads x / sigma_data and the angle atan(sigma / (sigma_data alpha)). With sigma_data = 1 on a VP
    schedule the row is that of "v".
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        _check_sigma_data(self.sigma_data)

    def row(self, l: Level) -> tuple[Tensor, Tensor]:
        return -l.sigma / self.sigma_data**2, l.alpha

    def solution(self, l: Level) -> Solution:
        return invert(self.row(l), l)

    def scale(self, l: Level) -> Tensor:
        return torch.full_like(l.alpha, 1 / self.sigma_data)

    def time(self, t: Tensor, l: Level) -> Tensor:
        return torch.atan2(l.sigma, self.sigma_data * l.alpha)


@dataclass(frozen=True)
class EDM:
    """D = c_skip x + c_out F(c_in x, c_noise) is x0 (Karras et al. 2022, Table 1). At tau = sigma / alpha

        c_skip = sd^2 / (tau^2 + sd^2),  c_out = tau sd / sqrt(tau^2 + sd^2),  c_in = 1 / sqrt(tau^2 + sd^2),
        c_noise = log(tau) / 4;   with n = sqrt(sigma^2 + sd^2 alpha^2) the row is (sigma / sd, -sd alpha) / n,

    so that only c_noise is undefined where alpha or sigma is 0.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_sigma_data(self.sigma_data)

    def row(self, l: Level) -> tuple[Tensor, Tensor]:
        scale = self.scale(l)
        return l.sigma / self.sigma_data * scale, -self.sigma_data * l.alpha * scale

    def solution(self, l: Level) -> Solution:
        return invert(self.row(l), l)

    def scale(self, l: Level) -> Tensor:
        return (l.sigma.square() + (self.sigma_data * l.alpha).square()).rsqrt()  # c_in / alpha, acting on x_t

    def time(self, t: Tensor, l: Level) -> Tensor:
        return (l.sigma / l.alpha).log() / 4


@dataclass(frozen=True)
class CM:
    """A consistency model: f = c_skip x + c_out F is x0, and f = x at tau = t_min (Song et al. 2023, App. C; 2.3.1):

        c_skip = sd^2 / ((tau - t_min)^2 + sd^2),  c_out = sd (tau - t_min) / sqrt(tau^2 + sd^2),  c_in, c_noise of EDM.

    At t_min f is known but y is not (c_out = 0): ``solution`` holds there, ``row`` does not. (The handbook's Eq. 24 is
    this wrapper around F; around an x0 estimate it would tend to sigma_data x0: erratum 29, see ``consistency.LCM``.)
    """

    sigma_data: float = 0.5
    t_min: float = 0.002

    def __post_init__(self) -> None:
        _check_sigma_data(self.sigma_data)
        if not self.t_min >= 0:
            raise ConfigError(f"t_min = {self.t_min}: expected a number >= 0")

    def row(self, l: Level) -> tuple[Tensor, Tensor]:
        skip, out = self._boundary(l)
        return (1 - skip * l.alpha) / out, -skip * l.sigma / out

    def solution(self, l: Level) -> Solution:
        skip, out = self._boundary(l)
        return Solution(skip, out, (1 - l.alpha * skip) / l.sigma, -l.alpha * out / l.sigma)

    def scale(self, l: Level) -> Tensor:
        return EDM(self.sigma_data).scale(l)

    def time(self, t: Tensor, l: Level) -> Tensor:
        return EDM(self.sigma_data).time(t, l)

    def _boundary(self, l: Level) -> tuple[Tensor, Tensor]:
        """c_skip, acting on x_t, and c_out."""
        tau, sd = l.sigma / l.alpha, self.sigma_data
        gap = tau - self.t_min
        return sd**2 / (gap.square() + sd**2) / l.alpha, sd * gap * (tau.square() + sd**2).rsqrt()


def _check_sigma_data(sigma_data: float) -> None:
    if not 0 < sigma_data < float("inf"):
        raise ConfigError(f"sigma_data = {sigma_data}: expected a number > 0")
