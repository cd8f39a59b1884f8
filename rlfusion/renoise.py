"""Scored samples noised afresh: what learners regress on that do not look at the steps of the walk.

x_t = alpha(t) x_0 + sigma(t) eps,     t = Q(u), u stratified over the batch
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlfusion.pretrain.times import Times
from rlfusion.schedule import Schedule, diffused, level
from rlfusion.seeding import Key, stream


class Noised(NamedTuple):
    """x_t (B, *), t (B,) float64 on the CPU, and the noise eps (B, *)."""

    x: Tensor
    t: Tensor
    eps: Tensor


def renoise(x0: Tensor, schedule: Schedule, times: Times, key: tuple[Key, ...]) -> Noised:
    """Noise samples x0 (B, *): a pure function of ``key``."""
    draw, size = stream(*key), len(x0)
    t = times(torch.from_numpy((draw.permutation(size) + draw.random(size)) / size), schedule)
    eps = torch.from_numpy(draw.standard_normal(x0.shape, dtype=np.float32)).to(x0)
    return Noised(noised(x0, eps, t, schedule), t, eps)


def noised(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t of given noise and times."""
    return diffused(x0, eps, level(schedule, t, x0))
