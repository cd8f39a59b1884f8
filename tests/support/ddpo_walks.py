"""DDPO's gradient of many walks, and walks of other weights than the learner's."""

import math

import torch
from chains import Capture, affine, class_walks, collect, mlp
from quadratic import STEPS, THETA, reward, task_of

from rlfusion.agents.ddpo import Config, Learner
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.rl.pathwise import PathwiseStep

PLAIN = {"epochs": 1, "updates_per_epoch": 1, "kl_loss": 0.0, "advantage": "none", "micro_batch": 10**6}


def estimate(made: dict, config: Config, acting=THETA, at=THETA, batches: int = 40, n: int = 4000, last: bool = False):
    """The mean gradient of J that ``update`` would ascend, and its standard error, over fresh walks of ``acting``;
    with the last step's pathwise part if ``last``.
    """
    actor, policy = affine(acting, **made), affine(at, **made)
    times, g = TimeGrid(STEPS).times(made["schedule"]), torch.Generator().manual_seed(0)
    learner = Learner(policy, times, config, 0, PathwiseStep(task_of(policy)) if last else None)
    learner.optimization = Capture(policy)
    for _ in range(batches):
        noise = torch.randn(n, STEPS + 1, 2, generator=g, dtype=torch.float64)
        learner.update(collect(actor, times, noise, reward))
    ascent = -torch.stack(learner.optimization.gradients).numpy()
    return ascent.mean(0), ascent.std(0, ddof=1) / math.sqrt(batches)


def walks_of_other_weights():
    """(policy, walks of another): as rollouts ahead of the weights give."""
    policy, other = mlp().double(), mlp().double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return policy, class_walks(other)
