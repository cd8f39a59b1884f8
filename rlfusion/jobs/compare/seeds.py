"""What several seeds say together: the mean of their curves, its interval, and whether two agents differ.

(1)  the mean over seeds of gains at equal queries, or seconds: linear between a run's evaluations, up to where the
     first of the runs ends
(2)  its interval: the middle 95 % of the means of RESAMPLES draws of as many seeds, with replacement (the
     bootstrap; of several rewards each has its own, so the strata of Agarwal et al. 2021 are the rewards)
(3)  two agents differ by the mean of their differences seed by seed, with the interval (2) of that mean; p is the
     share of all 2^n changes of sign of the n differences whose mean is as far from 0, or farther (``paired.flips``)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rlfusion.evaluation.paired import flips
from rlfusion.jobs.curves import Point

RESAMPLES, SHARE = 2000, 0.95
SIGNS = 2**14
"""Changes of sign that are drawn where there are too many to try all."""


class Band(NamedTuple):
    """A mean curve and its interval, each (points,)."""

    at: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Difference(NamedTuple):
    """How far one agent's gain is above another's, over ``seeds`` that both have."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eq. (2): the mean over the first axis of values (seeds, ...), and both ends of its interval. Of one seed they are
    its own.
    """
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = values[draws].mean(1)
    low, high = np.quantile(means, ((1 - SHARE) / 2, (1 + SHARE) / 2), axis=0)
    return values.mean(0), low, high


def band(runs: Sequence[Sequence[Point]], axis: Callable[[Point], float], value: Callable[[Point], float]) -> Band:
    """Eq. (1) and (2) of the runs of one agent on one reward."""
    ends = min(axis(points[-1]) for points in runs)
    at = np.unique([min(axis(point), ends) for points in runs for point in points])
    values = np.stack([np.interp(at, [axis(p) for p in points], [value(p) for p in points]) for points in runs])
    return Band(at, *interval(values))


def difference(one: Mapping[Any, float], other: Mapping[Any, float]) -> Difference | None:
    """Eq. (3) of the gains of two agents by seed, or by whatever pairs them; None where they share fewer than two."""
    both = sorted(one.keys() & other.keys())
    if len(both) < 2:
        return None
    values = np.array([one[seed] - other[seed] for seed in both])
    mean, low, high = interval(values)
    p = flips(torch.from_numpy(values), SIGNS, seed=1)
    return Difference(float(mean), float(low), float(high), p, len(both))
