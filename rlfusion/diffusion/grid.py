"""Time grids: the K + 1 falling times 1 = t_0 > t_1 > ... > t_K = 0 of a sampling chain, float64.

On a discrete schedule of T times the spacings are those of the field (Lin et al. 2023, Table 2), in our time k / T:

    trailing   k = round(T, T - T/K, T - 2T/K, ...)      leading   k = 1 + (T // K) {K-1, ..., 0}
    linspace   k = 1 + round(linspace(T - 1, 0, K))

each followed by 0. On a continuous schedule only trailing, the even grid, exists. (diffusers counts code times k - 1.)
"model" is the grid of a pretrained model's own sampler (``Listed``), where it has one.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, unknown
from rlfusion.diffusion.schedule import Schedule

Spacing = Literal["trailing", "leading", "linspace", "model"]


class Grid(Protocol):
    """The times of a chain."""

    def times(self, schedule: Schedule) -> Tensor:
        """The K + 1 falling times on ``schedule``, float64, on the CPU."""


@dataclass(frozen=True)
class Listed:
    """Times that a model's own sampler gives (spacing "model"), one by one."""

    listed: tuple[float, ...]

    def times(self, schedule: Schedule) -> Tensor:
        """The times, whatever the schedule."""
        return torch.tensor(self.listed, dtype=torch.float64)


@dataclass(frozen=True)
class TimeGrid:
    """``steps`` denoising steps (network calls), spaced as the module says. ``repeats`` > 0 makes that many moves at
    every time, the last one too (see ``repeated``): annealed Langevin dynamics.
    """

    steps: int = 20
    spacing: Spacing = "trailing"
    repeats: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps = {self.steps}: expected at least 1")
        if self.spacing not in get_args(Spacing):
            raise unknown("spacing", str(self.spacing), get_args(Spacing))
        require_not_negative(self, "repeats")

    def times(self, schedule: Schedule) -> Tensor:
        """The K + 1 falling times on ``schedule``, each ``repeats`` times if asked, float64, on the CPU.

        Raises:
            ConfigError: more steps than the schedule has times, or a discrete spacing on a continuous schedule.
        """
        times = self._falling(schedule)
        return repeated(times, self.repeats) if self.repeats else times

    def _falling(self, schedule: Schedule) -> Tensor:
        """The K + 1 falling times.

        Raises:
            ConfigError: more steps than the schedule has times, or a discrete spacing on a continuous schedule.
        """
        total = schedule.resolution
        if self.spacing == "model":
            raise ConfigError("spacing 'model' needs a model with a sampler of its own: expected another here")
        if total is None:
            if self.spacing != "trailing":
                raise ConfigError(f"spacing {self.spacing!r} needs a discrete schedule: expected 'trailing' here")
            return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        if self.steps > total:
            raise ConfigError(f"steps = {self.steps}: expected at most the schedule's {total} times")
        k = {
            "trailing": lambda: np.round(np.arange(self.steps, 0, -1) * total / self.steps),
            "leading": lambda: 1 + np.arange(self.steps)[::-1] * (total // self.steps),
            "linspace": lambda: 1 + np.round(np.linspace(0, total - 1, self.steps))[::-1],
        }[self.spacing]()
        return torch.from_numpy(np.append(k, 0).astype(np.float64)) / total


def repeated(times: Tensor, count: int) -> Tensor:
    """The chain with ``count`` steps at every time of ``times`` (K+1,), the last one too: (count (K + 1) + 1,).

    For annealed Langevin dynamics: with times 1 .. 0 there are ``count`` moves at each of the K + 1 noise levels.
    """
    if count < 1:
        raise ConfigError(f"count = {count}: expected at least 1")
    return torch.cat([times.repeat_interleave(count), times[-1:]])
