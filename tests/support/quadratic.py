"""The linear-Gaussian chain with a quadratic reward, in float64: where gradients have a closed form."""

import math
from itertools import pairwise

import numpy as np
import oracles
import torch

from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, FlowSDE
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import walk
from rlfusion.diffusion.schedule import DDPM, Rectified
from rlfusion.rollout import Task, rollout_noise
from rlfusion.rollout.trajectory import Trajectory

GOAL, KAPPA, THETA, STEPS, SEED = np.array([0.6, -0.1]), 0.5, (-0.3, 0.25), 4, 3
DDIM_V = {"schedule": DDPM(), "kernel": DDIM(1.0), "kind": "v"}
"""What ``chains.affine`` makes the policy of ``ddim_chain`` of."""


def reward(x: torch.Tensor, cond: object = None) -> torch.Tensor:
    return -KAPPA / 2 * (x - torch.from_numpy(GOAL)).square().sum(1)


def ddim_levels() -> tuple[np.ndarray, np.ndarray]:
    """(a, b) at the times of ``ddim_chain``, from the 1000-step table alone."""
    ab = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[999, 749, 499, 249]], 1.0)
    return np.sqrt(ab), np.sqrt(1 - ab)


def ddim_chain() -> tuple[oracles.LinearGaussianChain, dict]:
    """DDIM(1) on the 1000-step table, a v network (v = a eps - b x0): mean = (A a + B b) x + (B a - A b) y."""
    a, b = ddim_levels()
    A, B, S = np.array([oracles.ddim(t, s, 1.0) for t, s in pairwise(a**2)]).T
    a, b = a[:-1], b[:-1]
    return oracles.LinearGaussianChain(A * a + B * b, B * a - A * b, S, b[0], KAPPA, GOAL), DDIM_V


def flow_chain() -> tuple[oracles.LinearGaussianChain, dict]:
    """Flow-GRPO's step on rectified flow, a flow network; the last step is x - t y."""
    p, q, std = [], [], []
    for t, s in zip((1, 0.75, 0.5), (0.75, 0.5, 0.25)):
        dt, g2 = s - t, 0.7**2 * t / (1 - (t if t < 1 else s))
        p.append(1 + g2 / (2 * t) * dt)
        q.append((1 + g2 * (1 - t) / (2 * t)) * dt)
        std.append(math.sqrt(g2 * -dt))
    p, q, std = (np.array(v) for v in ([*p, 1.0], [*q, -0.25], [*std, 0.0]))
    chain = oracles.LinearGaussianChain(p, q, std, 1.0, KAPPA, GOAL)
    return chain, {"schedule": Rectified(), "kernel": FlowSDE(0.7), "kind": "flow"}


CHAINS = {"ddim": ddim_chain, "flow": flow_chain}


def task_of(policy: Policy, score=reward) -> Task:
    return Task(policy, TimeGrid(STEPS), (2,), None, lambda x: x, lambda x, _: score(x), "quadratic")


def prefixes(policy: Policy, begin: torch.Tensor, iteration: int = 0, dtype=torch.float64) -> Trajectory:
    """What workers would send, in ``dtype``: the states before the steps ``begin`` (n,)."""
    times, n = TimeGrid(STEPS).times(policy.schedule), len(begin)
    noise = rollout_noise(SEED, iteration, range(n), STEPS, (2,)).to(dtype)
    with torch.no_grad():
        steps = list(walk(policy, noise, times))
    x = torch.stack([steps[0].obs.x, *(s.x for s in steps)], 1)[torch.arange(n), begin]
    return Trajectory(x[:, None], times, None, None, torch.zeros(n, dtype=torch.int64), None, 0, begin)


def assert_equal_in_expectation(estimated, truth, power: float = 0.05) -> None:
    """A mean and its standard error agree with the truth, and the error is less than ``power`` of it."""
    mean, error = estimated
    assert (error < power * np.abs(truth)).all(), f"no power: {mean} +- {error}, expected {truth}"
    assert (np.abs(mean - truth) < 4 * error).all(), f"{mean} +- {error}, expected {truth}"
