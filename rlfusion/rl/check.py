"""A chain whose expected reward is known in closed form: what a learner's updates are measured by.

    (1)  the network answers y = theta_0 x + theta_1, so that a step is  x_s = (p + q theta_0) x_t + q theta_1 + S z
    (2)  m' = c m + q theta_1,   V' = c^2 V + S^2,   c = p + q theta_0,   from m = 0, V = 1
    (3)  R(x) = -mean_d (x_d - r)^2 / 2,   J(theta) = E R = -((m - r)^2 + V) / 2

What a learner opens by name is the chain's own too, whatever it is called: a teacher of a larger J, and stored samples
of its walks with their rewards as scores.

p, q and S are those of the kernel and of the kind of prediction at each step. Eq. (2) of the last step and Eq. (3) are
float64; the gradient of J is autograd's, through the recursion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.parameterization import solve
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.outside import Stored
from rlfusion.rollout.trajectory import Trajectory, concatenate

SHAPE, PROMPTS, STEPS, GOAL, KIND = (1, 4, 4), 2, 5, 0.8, "v"
BEGIN = (0.05, 0.0)
"""theta at first: near the exact denoiser of N(0, 1) data, which is (0, 0) for "v"."""
AHEAD = 0.2
"""How far the teacher is from there, along dJ / dtheta."""
STORED = 256


class Affine(nn.Module):
    """Eq. (1): ``net(x, t, cond)``, which reads x alone."""

    def __init__(self, theta: Sequence[float] = BEGIN) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        return self.theta[0] * x + self.theta[1]


def reward(samples: Tensor, cond: object) -> Tensor:
    """Eq. (3) of each sample, (B,)."""
    return -(samples - GOAL).square().mean((1, 2, 3)) / 2


def policy_of(theta: Sequence[float]) -> Policy:
    """The policy of Eq. (1) with these weights."""
    return Policy(Denoiser(Affine(theta), Cosine(), KIND), DDIM(1.0))


@dataclass(frozen=True)
class Beside:
    """An ``Outside`` of a task: a teacher of the weights ``theta`` (2,), and the ends of ``STORED`` of its walks."""

    task: Task
    theta: Tensor

    def teacher(self, model: str, guidance: float | None) -> Policy:
        return policy_of(self.theta.tolist()).requires_grad_(False)

    def stored(self, data: str) -> Stored:
        walks = Chain(self.task).walks(self.teacher(data, None), STORED, 0, 0)
        return Stored(walks.x[:, -1], walks.group, walks.scored.double())


@dataclass(frozen=True)
class Chain:
    """The chain of Eq. (1) with its task: a policy of two weights, 2 prompts that it does not read, 16 dimensions."""

    task: Task

    @classmethod
    def make(cls) -> "Chain":
        """One with the weights ``BEGIN``."""
        prompts = torch.arange(PROMPTS)
        chain = cls(Task(policy_of(BEGIN), TimeGrid(STEPS), SHAPE, prompts, lambda x: x, reward, "the chain's own"))
        up = chain.gradient(chain.theta)
        return cls(replace(chain.task, outside=Beside(chain.task, chain.theta + AHEAD * up / up.norm())))

    @property
    def theta(self) -> Tensor:
        """The weights (2,), float64."""
        return self.task.policy.get_parameter("denoiser.net.theta").detach().double().clone()

    def value(self, theta: Tensor) -> Tensor:
        """J of Eq. (3)."""
        policy, times, mean, var = self.task.policy, self.task.times, torch.zeros(()), torch.ones(())
        for t, s in pairwise(times):
            level, to = policy.schedule(t), policy.schedule(s)
            x0, eps, std = policy.kernel.coefficients(level, to, s - t)
            c = solve(KIND, level)
            p, q = x0 * c.x0_x + eps * c.eps_x, x0 * c.x0_y + eps * c.eps_y
            slope = p + q * theta[0]
            mean, var = slope * mean + q * theta[1], slope.square() * var + std.square()
        return -((mean - GOAL).square() + var) / 2

    def gradient(self, theta: Tensor) -> Tensor:
        """dJ / dtheta, (2,)."""
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(self.value(theta), theta)[0]

    def walks(self, policy: Policy, count: int, seed: int, iteration: int) -> Trajectory:
        """A rollout of ``count`` walks, the prompts in turn, under the present weights."""
        task = replace(self.task, policy=policy)
        items = plan(seed, iteration, PROMPTS, count // PROMPTS, count, PROMPTS, iteration)
        return concatenate([run_item(task, item) for item in items])


def samples(count: int = 64) -> Dataset:
    """Data of the law that the chain begins near: N(0, 1) in each dimension, of 2 classes."""
    draw = torch.Generator().manual_seed(0)
    return Dataset(torch.randn(count, *SHAPE, generator=draw), torch.arange(count) % PROMPTS, ("a", "b"))
