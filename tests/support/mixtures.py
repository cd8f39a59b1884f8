"""A plane mixture of isotropic Gaussians: its exact denoiser in torch, and a two-sample test."""

import numpy as np
import oracles
import torch
from by_answer import ByAnswer
from torch import Tensor, nn

from rlfusion.diffusion.parameterization import target
from rlfusion.diffusion.schedule import level

WEIGHT, MEAN, VAR = (0.6, 0.4), ((-0.6, 0.2), (0.5, -0.3)), (0.04, 0.02)


def law(weight=WEIGHT, mean=MEAN, var=VAR) -> oracles.Mixture:
    return oracles.Mixture(np.array(weight), np.array(mean), np.array(var)[:, None, None] * np.eye(2))


class Exact(ByAnswer):
    """E[x0 | x_t] of the mixture as a network that predicts ``kind``; x (B, 2, 1, 1)."""

    def __init__(self, schedule, kind, weight=WEIGHT, mean=MEAN, var=VAR) -> None:
        super().__init__(nn.Linear(1, 1), schedule, kind)
        self.law = [torch.tensor(part, dtype=torch.float64) for part in (weight, mean, var)]

    def answer(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        l = level(self.schedule, t, x)
        a, b, flat = l.alpha.reshape(-1, 1), l.sigma.reshape(-1, 1), x.flatten(1).double()
        weight, mean, var = self.law
        spread = a**2 * var + b**2
        gap = flat[:, None] - a[..., None] * mean
        p = (weight.log() - gap.square().sum(2) / (2 * spread) - spread.log()).softmax(1)
        x0 = (p[..., None] * (mean + (a * var / spread)[..., None] * gap)).sum(1)
        eps = (flat - a * x0) / b
        return target(self.kind, x0.reshape(x.shape), eps.reshape(x.shape), l).to(x)


def mmd_p_value(x: Tensor, y: Tensor, width: float = 0.4, permutations: int = 400, seed: int = 0) -> float:
    """The permutation p-value of the MMD with a Gaussian kernel between (N, d) and (M, d) (Gretton et al. 2012)."""
    both, n = torch.cat([x, y]).double(), len(x)
    kernel = torch.exp(-torch.cdist(both, both).square() / (2 * width**2))
    g = torch.Generator().manual_seed(seed)
    orders = [torch.arange(len(both)), *(torch.randperm(len(both), generator=g) for _ in range(permutations))]
    sign = torch.full((len(both), len(orders)), -1 / len(y), dtype=torch.float64)
    for column, order in enumerate(orders):
        sign[order[:n], column] = 1 / n
    discrepancy = (sign * (kernel @ sign)).sum(0)
    return (discrepancy >= discrepancy[0] - 1e-12).double().mean().item()
