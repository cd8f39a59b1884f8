"""Scored samples noised afresh: what learners regress on that do not look at the steps of the walk.

(1)  x_t = alpha(t) x_0 + sigma(t) eps,     t = Q(u), u stratified over the batch
(2)  KL of the walks of one denoiser's reverse SDE, dx = [(alpha'/alpha) x - g^2 s] dt + g dw, to those of another's, by
     Girsanov: E integral g^2 |s - s_ref|^2 / 2 dt = E_t,x_t (sigma'/sigma - alpha'/alpha) |eps - eps_ref|^2,  t uniform
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.seeding import Key, stream
from rlfusion.common.tensors import Cond, cast, staged, sum_features
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Schedule, diffused, level
from rlfusion.objectives.times import Times, Uniform
from rlfusion.objectives.weighting import VLB

SPAN = (0.02, 0.98)
"""The times of Eq. (2): at the very ends the rate is infinite, or the kind undefined."""


class Noised(NamedTuple):
    """x_t (B, *), t (B,) float64 on the CPU, and the noise eps (B, *)."""

    x: Tensor
    t: Tensor
    eps: Tensor


def renoise(x0: Tensor, schedule: Schedule, times: Times, key: tuple[Key, ...]) -> Noised:
    """Noise samples x0 (B, *): a pure function of ``key``."""
    t, eps = fresh(x0[:, None], len(x0), schedule, times, key)
    return Noised(noised(x0, eps, t, schedule), t, eps)


def fresh(x: Tensor, count: int, schedule: Schedule, times: Times, key: tuple[Key, ...]) -> tuple[Tensor, Tensor]:
    """``draws`` for ``count`` of the walks x (B, K+1, *): the noise (count, *) in their precision, on their device."""
    t, eps = draws((count, *x.shape[2:]), schedule, times, key)
    return t, staged(eps.to(x.dtype), x.device)


def draws(shape: Sequence[int], schedule: Schedule, times: Times, key: tuple[Key, ...]) -> tuple[Tensor, Tensor]:
    """The times (B,) and the noise (B, *), on the CPU, of samples of this shape (B, *): a pure function of ``key``."""
    draw, size = stream(*key), shape[0]
    t = times(torch.from_numpy((draw.permutation(size) + draw.random(size)) / size), schedule)
    return t, torch.from_numpy(draw.standard_normal(tuple(shape), dtype=np.float32))


@torch.no_grad()
def divergence(policy: Policy, reference: Policy, x0: Tensor, cond: Cond, key: tuple[Key, ...]) -> Tensor:
    """Eq. (2) over ``SPAN`` of time, (B,), nats a walk: its estimate by one noising of each of the policy's samples."""
    noise = renoise(x0, policy.schedule, Uniform(0.0), key)
    t = SPAN[0] + (SPAN[1] - SPAN[0]) * noise.t
    x, l = noised(x0, noise.eps, t, policy.schedule), level(policy.schedule, t, x0)
    apart = sum_features((policy.denoiser(x, t, cond).eps - reference.denoiser(x, t, cond).eps).square())
    return (SPAN[1] - SPAN[0]) * cast(VLB()("eps", l).flatten(), x) * apart


def noised(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t of given noise and times."""
    return diffused(x0, eps, level(schedule, t, x0))
