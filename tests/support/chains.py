"""Small policies and the walks that tests feed to learners."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, Kernel
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import walk
from rlfusion.diffusion.schedule import Cosine, Schedule
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout.trajectory import Trajectory

STOCHASTIC = DDIM(1.0)


class Affine(nn.Module):
    """y = theta_0 x + theta_1: with any kernel and kind, a linear-Gaussian chain of two parameters."""

    def __init__(self, theta: tuple[float, float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        return self.theta[0] * x + self.theta[1]


def affine(theta: tuple[float, float], schedule: Schedule, kernel: Kernel, kind: str) -> Policy:
    return Policy(Denoiser(Affine(theta), schedule, kind), kernel)


def mlp(seed: int = 0, kernel: Kernel = STOCHASTIC) -> Policy:
    """A network of 3x2 latents and 4 classes that answers something other than 0."""
    torch.manual_seed(seed)
    net = ResidualMLP((1, 3, 2), classes=4, width=16, depth=2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Policy(Denoiser(net, Cosine(), "v"), kernel)


@torch.no_grad()
def collect(
    policy: Policy, times: Tensor, noise: Tensor, reward: Callable[[Tensor], Tensor], cond: Tensor | None = None
) -> Trajectory:
    """One walk a row of ``noise`` (B, K+1, *)."""
    steps = list(walk(policy, noise, times, cond))
    log_prob = torch.stack([s.transition.log_prob(s.x) for s in steps], 1)
    x = torch.stack([steps[0].obs.x, *(s.x for s in steps)], 1)
    group = torch.zeros(len(noise), dtype=torch.int64) if cond is None else cond
    return Trajectory(x, times, log_prob, reward(x[:, -1]), group, cond, 0)


def class_walks(policy: Policy, n: int = 24, steps: int = 4, seed: int = 0) -> Trajectory:
    """Walks of ``mlp`` with labels 0..3, rewarded by the mean of the sample."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, steps + 1, 1, 3, 2, generator=g).to(next(policy.parameters()))
    times = TimeGrid(steps).times(policy.schedule)
    return collect(policy, times, noise, lambda x: x.mean((1, 2, 3)), torch.arange(n) % 4)


def all_transitions(batch: Trajectory) -> tuple[Tensor, Tensor]:
    """(walk, step) of every transition that has a density."""
    return tuple(batch.log_prob.isfinite().nonzero().T)


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


class Capture:
    """Stands where a learner's optimiser does: keeps each gradient instead of stepping on it, and clears it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.gradients = module, []
        self.optimizer = module

    def step(self, share: float = 1.0) -> float:
        self.gradients.append(flat_gradient(self.module))
        self.clear()
        return math.nan

    def clear(self) -> None:
        self.module.zero_grad()
