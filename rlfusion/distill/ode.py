"""The teacher's way along the probability-flow ODE from t to s < t, without gradient: each sample has its own times.

(1)  DDIM:  x_s = alpha_s x0_hat + sigma_s eps_hat
(2)  in r = sigma / alpha, x / alpha moves by dr eps_hat, and in 1 / r, x / sigma by d(1/r) x0_hat. Heun's step is
     Eq. (1) with the mean of the two answers, at x_t and at Eq. (1)'s x_s, in the place of eps_hat (of x0_hat);
     the other of the two stays what x_t = alpha_t x0 + sigma_t eps makes of it:
         x_s = (alpha_s / alpha_t) (x_t - sigma_t eps) + sigma_s eps        (alpha_t x0 = x_t - sigma_t eps)
     r is used where r < 1 on the middle of the way, 1 / r elsewhere, so that neither pure noise nor clean data is
     a division by 0. The step to clean data has no second answer.
(3)  m sub-steps over given times                                        (handbook Eq. 22, erratum 28)
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from rlfusion.common import shards
from rlfusion.common.tensors import Cond, cast, map_cond
from rlfusion.diffusion.schedule import diffused, level

Solver = Literal["ddim", "heun"]


def ddim(teacher: nn.Module, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """Eq. (1): x (B, *) at t (B,) to s (B,), one call."""
    return diffused(*teacher(x, t, cond), level(teacher.schedule, s, x))


def heun(teacher: nn.Module, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """Eq. (2): two calls, the second only for samples that do not reach clean data."""
    at, to = level(teacher.schedule, t, x), level(teacher.schedule, s, x)
    x0, eps = teacher(x, t, cond)
    guess = diffused(x0, eps, to)
    rows = (to.sigma.flatten() > 0).nonzero().flatten()
    if not len(rows) and not shards.roots(teacher):
        return guess
    asked = rows if len(rows) else torch.zeros(1, dtype=torch.int64)  # all ranks ask a teacher in shards equally often
    here = asked.to(x.device)
    second = teacher(guess[here], s[asked], map_cond(lambda c: c[here], cond))
    if not len(rows):
        return guess
    x0, eps = ((a + a.index_copy(0, here, b)) / 2 for a, b in zip((x0, eps), second))
    by_noise = _trapezoid(x, eps, at.alpha, at.sigma, to.alpha, to.sigma)
    by_data = _trapezoid(x, x0, at.sigma, at.alpha, to.sigma, to.alpha)
    late = at.sigma + to.sigma < at.alpha + to.alpha
    moved = torch.where(late.to(x.device), by_noise, by_data)
    return guess.index_copy(0, here, moved[here])


def _trapezoid(x: Tensor, slope: Tensor, a: Tensor, b: Tensor, a_s: Tensor, b_s: Tensor) -> Tensor:
    """a_s / a (x - b slope) + b_s slope, 0 / 0 where it will not be used."""
    ratio = a_s / torch.where(a > 0, a, 1.0)
    return cast(ratio, x) * x + cast(b_s - ratio * b, x) * slope


SOLVERS = {"ddim": ddim, "heun": heun}


@torch.no_grad()
def along(teacher: nn.Module, x: Tensor, times: Sequence[Tensor], cond: Cond, solver: Solver = "ddim") -> Tensor:
    """Eq. (3): x (B, *) at ``times[0]`` (B,) float64 to the last of ``times``."""
    for t, s in pairwise(times):
        x = SOLVERS[solver](teacher, x, t, s, cond)
    return x
