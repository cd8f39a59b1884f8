"""Zero terminal SNR (Lin et al. 2023, Alg. 1): a VP schedule shifted and stretched so that alpha(1) = 0.

    (1)  alpha~(t) = (alpha(t) - alpha(1)) alpha(t_1) / (alpha(t_1) - alpha(1)),  t >= t_1,     sigma~^2 = 1 - alpha~^2

t_1 is the first time after data: 1 / T of a table, where alpha keeps its value (and so on [0, t_1], where nothing is
changed), and 0 in continuous time. At t = 1 there is no signal: a network predicts x0 or v there, not eps.

Samplers that count in sigma / alpha keep a last signal, ``last`` = alpha~(1) at t = 1 alone (2^-12 in diffusers).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.schedule.base import Level, Schedule
from rlfusion.diffusion.schedule.tables import TABLES, ShiftedSNR
from rlfusion.diffusion.schedule.vp import VP

BASES: Mapping[str, Callable[..., Schedule]] = {**TABLES, "ShiftedSNR": ShiftedSNR, "VP": VP}
"""The VP schedules that keep some signal at t = 1."""


@dataclass(frozen=True)
class ZeroSNR:
    """Eq. (1) of the schedule that ``base`` writes: DDPM(...), ScaledLinear(...), SquaredCosine(...), VP(...), or
    ShiftedSNR(...) of a table. ``last`` in [0, 1) is alpha at t = 1.
    """

    base: str = "DDPM()"
    last: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.last < 1:
            raise ConfigError(f"last = {self.last}: expected 0 <= last < 1")
        first, last = self.ends.alpha
        if not first > last:
            raise ConfigError(f"base = {self.base!r}: expected a schedule of more than one time")

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule that ``base`` writes."""
        return spec.parse(self.base, BASES, "VP schedule")

    @cached_property
    def ends(self) -> Level:
        """The base's levels at t_1 and at 1."""
        return self.schedule(torch.tensor([self.start, 1.0], dtype=torch.float64))

    @property
    def start(self) -> float:
        """t_1."""
        return 0.0 if self.resolution is None else 1 / self.resolution

    @property
    def resolution(self) -> int | None:
        return self.schedule.resolution

    def __call__(self, t: Tensor) -> Level:
        l = self.schedule(t)
        first, last = (alpha.item() for alpha in self.ends.alpha)
        stretch = first / (first - last)
        end = torch.full_like(t, self.last)
        alpha = ((l.alpha - last) * stretch).where(t != 1, end)
        # 1 - alpha~ from 1 - alpha = sigma^2 / (1 + alpha): exact near t = 0, where 1 - alpha~^2 would cancel
        rest, rest_1 = l.sigma.square() / (1 + l.alpha), float(self.ends.sigma[0]) ** 2 / (1 + first)
        left = rest + last * (rest - rest_1) / (first - last)
        sigma = (left * (1 + alpha)).clamp(min=0).sqrt().where(t != 1, (1 - end.square()).sqrt())
        d_alpha = l.d_alpha * stretch
        stretched = Level(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)
        return Level(*(torch.where(t <= self.start, base, new) for base, new in zip(l, stretched)))
