"""The Gaussian of a transition.

(1)  log N(x; m, s^2 I) = sum_d [ -(x - m)^2 / (2 s^2) - log s - log(2 pi) / 2 ]          (a sum, not a mean)
(2)  KL(N(m1, s1^2) || N(m2, s2^2)) = sum_d [ (s1^2 + (m1 - m2)^2) / s2^2 - 1 - log(s1^2 / s2^2) ] / 2
"""

import math
from typing import NamedTuple

from torch import Tensor

from rlfusion.common.tensors import sum_features


class Gaussian(NamedTuple):
    """N(mean, std^2 I): mean (B, ...), std () or (B, 1, ..., 1). std = 0 is a point mass: it has no density."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with ``noise`` standard normal (B, ...); differentiable in mean and std."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Eq. (1), (B,), in float32 or better. A point mass (std = 0) answers NaN: it has no density."""
        mean, std = _at_least_float32(self.mean), _at_least_float32(self.std)
        z = (_at_least_float32(x) - mean) / std
        constant = std.log() + math.log(2 * math.pi) / 2
        density = -sum_features(z.square() / 2 + constant)
        return density.masked_fill((std == 0).flatten(), math.nan)

    def kl(self, other: "Gaussian") -> Tensor:
        """Eq. (2), KL(self || other), (B,). Where both have one std it is |m1 - m2|^2 / (2 s^2)."""
        v1, v2 = _at_least_float32(self.std).square(), _at_least_float32(other.std).square()
        gap = _at_least_float32(self.mean) - _at_least_float32(other.mean)
        return sum_features((gap.square() + v1) / v2 - 1 - (v1 / v2).log()) / 2

    def entropy(self) -> Tensor:
        """sum_d [ log s + (1 + log 2 pi) / 2 ], (B,)."""
        return sum_features((self.std.log() + (1 + math.log(2 * math.pi)) / 2).expand_as(self.mean))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.itemsize >= 4 else x.float()
