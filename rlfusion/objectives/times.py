"""Distributions of the noise levels in training: of t in (0, 1), by their quantile functions, t = Q(u), u uniform.

(1)  Uniform:      t = u, held in [margin, 1 - margin]
(2)  LogitNormal:  log(t / (1 - t)) ~ N(mean, std^2)                 (Esser et al. 2024, section 3.1)
(3)  LogNormal:    log tau ~ N(mean, std^2), tau = sigma / alpha     (Karras et al. 2022, Table 1)
(4)  Chain:        the times from which a sampler takes its K steps, each with probability 1 / K
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.diffusion.schedule import Schedule, time_of


class Times(Protocol):
    """A frozen dataclass: quantiles u (B,) in (0, 1), float64, to times (B,) in (0, 1) on a schedule."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """Eq. (1). The margin keeps kinds that are undefined at clean data or pure noise away from the ends."""

    margin: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 0.5:
            raise ConfigError(f"margin = {self.margin}: expected 0 <= margin < 0.5")

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u.clamp(self.margin, 1 - self.margin)


@dataclass(frozen=True)
class LogitNormal:
    """Eq. (2)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "std")

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(u)).sigmoid()


@dataclass(frozen=True)
class LogNormal:
    """Eq. (3), on any schedule. Ratios beyond the schedule's own become its ends."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        require_positive(self, "std")

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        tau = (self.mean + self.std * torch.special.ndtri(u)).exp()
        return time_of(schedule, torch.ones_like(tau), tau)


@dataclass(frozen=True)
class Chain:
    """Eq. (4). ``of_chain`` makes the law of it."""


@dataclass(frozen=True)
class OnGrid:
    """Eq. (4), of the times from which steps are taken."""

    times: tuple[float, ...]

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        at = torch.tensor(self.times, dtype=torch.float64)
        return at[(u * len(at)).long().clamp(max=len(at) - 1)]


def of_chain(law: Times | Chain, times: Tensor) -> Times:
    """The law itself, or that of the grid ``times`` (K+1,) where it is the chain's."""
    return OnGrid(tuple(times[:-1].tolist())) if isinstance(law, Chain) else law


TIMES: Mapping[str, Callable[..., Times]] = {cls.__name__: cls for cls in (Uniform, LogitNormal, LogNormal)}

LAWS: Mapping[str, Callable[..., Times | Chain]] = {**TIMES, "Chain": Chain}
"""Those of learners that have a chain."""
