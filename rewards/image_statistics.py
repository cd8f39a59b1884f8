"""Statistics of images as rewards and penalties: brightness, edge density, entropy (``evaluation.images``).

    (1)  s(x)                             the statistic itself, without bounds
    (2)  -max(low - s(x), s(x) - high, 0)  with bounds: 0 within them, below them and above them minus the distance

A reward that can be hacked is weighed beside such a penalty: ``{pick_score: 1, entropy: 0.5}`` with ``entropy: {low:
2}`` costs a sample what it lacks of two bits. Brightness has a gradient; the other two, which count, have none.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond, mean_features
from rlfusion.evaluation import images


@dataclass(frozen=True)
class Statistic(ABC):
    """
    Attributes:
        low, high: where the statistic may be at no cost; neither gives the statistic itself.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        ends = [end for end in (self.low, self.high) if end is not None]
        if not all(map(math.isfinite, ends)) or ends != sorted(ends):
            raise ConfigError(f"low, high = {self.low}, {self.high}: expected finite numbers, low <= high, or neither")

    def __call__(self, samples: Tensor, cond: Cond) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B,), Eq. (1) or (2)."""
        value = self.measured(samples)
        if self.low is None and self.high is None:
            return value
        below = torch.zeros_like(value) if self.low is None else (self.low - value).clamp(min=0)
        above = torch.zeros_like(value) if self.high is None else (value - self.high).clamp(min=0)
        return -(below + above)

    @abstractmethod
    def measured(self, samples: Tensor) -> Tensor:
        """s(x), (B,)."""


@dataclass(frozen=True)
class Brightness(Statistic):
    """The mean over channels and pixels, in [0, 1]. Differentiable."""

    def measured(self, samples: Tensor) -> Tensor:
        return mean_features(samples)


@dataclass(frozen=True)
class EdgeDensity(Statistic):
    """The share of pixels that differ by more than 1/4 from the next, in [0, 1]: high for speckle, low for blur."""

    @torch.no_grad()
    def measured(self, samples: Tensor) -> Tensor:
        return images.edge_density(samples)


@dataclass(frozen=True)
class Entropy(Statistic):
    """Bits of the histogram of 16 grey levels, in [0, 4]: low where levels are lost."""

    @torch.no_grad()
    def measured(self, samples: Tensor) -> Tensor:
        return images.entropy(samples)
