"""Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1-2), and the spread within classes.

M(Phi) = union over p in Phi of the balls B(p, distance from p to its k-th nearest other point of Phi)
precision = share of the samples in M(real)        recall = share of the real in M(samples)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]: how much of the samples looks real, and how much of the real is covered."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, real: Tensor, k: int = 3, chunk: int = 1024) -> PrecisionRecall:
    """Features (N, F) of samples and (M, F) of real data; ``chunk`` rows of distances are held at a time.

    Raises:
        ConfigError: other shapes, or k or fewer points in a set.
    """
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise ConfigError(f"features of shape {tuple(samples.shape)} and {tuple(real.shape)}: expected (N, F), (M, F)")
    if not 1 <= k < min(len(samples), len(real)):
        raise ConfigError(f"k = {k}: expected 1 <= k < {min(len(samples), len(real))}, the smaller set's size")
    a, b = samples.double(), real.double()
    return PrecisionRecall(
        precision=_covered(a, b, radii(b, k, chunk), chunk),
        recall=_covered(b, a, radii(a, k, chunk), chunk),
    )


def radii(points: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """(N, F) -> (N,): the distance of each point to its k-th nearest other point."""
    return torch.cat([_distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(chunk)])


def _covered(queries: Tensor, points: Tensor, radius: Tensor, chunk: int) -> float:
    """The share of ``queries`` that lie in a ball about one of ``points``."""
    inside = [(_distances(part, points) <= radius).any(1) for part in queries.split(chunk)]
    return torch.cat(inside).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M), by differences: a point is at exactly 0 from itself."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def class_spread(features: Tensor, label: Tensor) -> dict[int, float]:
    """Features (N, F), label (N,) -> the mean distance between two members of each class that has two or more."""
    spread = {}
    for c in label.unique().tolist():
        members = features[label == c].double()
        if len(members) > 1:
            spread[c] = torch.pdist(members).mean().item()
    return spread
