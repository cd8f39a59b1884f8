"""What a reward is of the base model's samples, and rewards on that scale.

    (1)  m = median of r,   MAD = median of |r - m|,   s = SPREAD MAD, the standard deviation of normal values
    (2)  (r - m) / s

The median of an even number of values is the mean of the two in the middle.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, StateError

SPREAD = 1.4826
"""The standard deviation of a normal distribution over its MAD."""


class Moments(NamedTuple):
    """What some values are: Eq. (1), their mean and population standard deviation, and how many they are."""

    median: float
    mad: float
    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Those of values (N,), in float64."""
        held = values.detach().double().cpu()
        median = float(np.median(held))
        return cls(
            median,
            float(np.median((held - median).abs())),
            held.mean().item(),
            held.std(correction=0).item(),
            len(held),
        )

    @classmethod
    def read(cls, held: Any, name: str) -> Self:
        """Those that ``_asdict`` gave, of the reward ``name``.

        Raises:
            StateError: it is not what that gives.
        """
        kinds = dict.fromkeys(cls._fields, float) | {"count": int}
        fine = isinstance(held, Mapping) and held.keys() == kinds.keys()
        if not fine or not all(isinstance(held[n], kind) and math.isfinite(held[n]) for n, kind in kinds.items()):
            raise StateError(f"the calibration: reward {name!r} has other entries than {', '.join(kinds)}")
        return cls(**held)

    @property
    def spread(self) -> float:
        """s of Eq. (1)."""
        return SPREAD * self.mad

    def on_scale(self, values: Tensor) -> Tensor:
        """Eq. (2), of the shape of ``values``."""
        return (values - self.median) / self.spread


def require_spread(found: Mapping[str, Moments]) -> None:
    """
    Raises:
        ConfigError: more than half of a reward's values are one and the same: Eq. (2) is not defined.
    """
    for name, moments in found.items():
        if not moments.mad > 0:
            raise ConfigError(
                f"reward_normalize = calibrated: the MAD of reward {name!r} on {moments.count} samples of the base "
                f"model is 0 (median {moments.median:g}): expected a reward of which fewer than half are equal, a "
                "larger base_samples, or reward_normalize group"
            )


def stacked(terms: Mapping[str, Tensor]) -> Tensor:
    """Named values (N,) each as (N, R), in their order."""
    return torch.stack(list(terms.values()), 1)
