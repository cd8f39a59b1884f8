"""The value of a noised sample, Q(x_t, t, c), and its gradient in x_t (Psenka et al. 2023; handbook 3.3.1).

    (1)  noised:    Q = R(decode(x_t), c)
    (2)  denoised:  Q = R(decode(x0_hat(x_t, t, c)), c),  the gradient passes through the denoiser, whose weights are
                    constants
    (3)  learned:   a critic (``critic``)

Against the soft value V = log E[exp(beta R(x0)) | x_t] / beta, whose gradient leads to the tilted density: Eq. (2) is R
at the mean of x0, right where x0 is known (late) or R is linear, and beyond V where R is concave. For x0 | x_t =
N(m, v) and R = -k (x - r)^2 / 2:  dV/dx_t = dQ/dx_t / (1 + beta k v).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rlfusion.common.tensors import Cond
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.rollout import Task


class Q(Protocol):
    """x (B, *), t (B,) float64 on the CPU, cond -> (B,)."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor: ...


@dataclass(frozen=True)
class Noised:
    """Eq. (1)."""

    task: Task

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.task.score(x, cond)


@dataclass(frozen=True)
class Denoised:
    """Eq. (2)."""

    task: Task
    denoiser: nn.Module

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.task.score(self.denoiser(x, t, cond).x0, cond)


def through(q: Denoised, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Prediction]:
    """``gradient``, and the prediction that Q looked at, a constant too."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        seen = q.denoiser(x, t, cond)
        value = q.task.score(seen.x0, cond)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0], Prediction(seen.x0.detach(), seen.eps.detach())


def gradient(q: Q, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """(Q (B,), dQ/dx (B, *)), constants."""
    if isinstance(q, Denoised):
        return through(q, x, t, cond)[:2]
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = q(x, t, cond)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]
