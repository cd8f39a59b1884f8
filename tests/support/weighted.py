"""What tests of weighted regression share: tasks, what workers keep of walks, and a soft value in closed form."""

from dataclasses import replace

import numpy as np
import torch
from quadratic import GOAL, KAPPA, STEPS

from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, FlowSDE, Renoise
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import DDPM, Cosine, Karras, Rectified, Trig
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.trajectory import Trajectory

ONE = {"epochs": 1, "updates_per_epoch": 1, "noisings": 1, "micro_batch": 10**6}
RAW = {"mean_one": False, "normalize": "none", "w_max": None}
BETA = 0.8


def plain_task(policy: Policy, shape: tuple[int, ...] = (2,), classes: int | None = None) -> Task:
    conditions = None if classes is None else torch.arange(classes)
    return Task(policy, TimeGrid(STEPS), shape, conditions, lambda x: x, lambda x, c: x.flatten(1).mean(1), "mean")


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def soft(chain, acting) -> float:
    """E exp(beta R) of the quadratic reward at the end of the chain."""
    m, v = chain.law(acting)
    k = BETA * KAPPA
    return float(np.prod((1 + k * v) ** -0.5 * np.exp(-k * (m - GOAL) ** 2 / (2 * (1 + k * v)))))


def ends_of(batch: Trajectory) -> Trajectory:
    """What workers keep of whole walks for regression on samples."""
    begin = torch.full((len(batch),), batch.steps)
    return Trajectory(batch.x[:, -1:], batch.times, None, batch.reward, batch.group, batch.cond, batch.version, begin)


FAMILIES = {
    "eps": (DDPM(), "eps", DDIM(1.0), 8),
    "v": (Cosine(), "v", DDIM(0.7), 8),
    "flow": (Rectified(), "flow", FlowSDE(0.7), 8),
    "TrigFlow": (Trig(), "TrigFlow()", DDIM(1.0), 8),
    "ode": (Cosine(), "v", DDIM(0.0), 8),
    "consistency": (Karras(), "CM(sigma_data=0.5)", Renoise(0.002), 2),
}


def family(name: str) -> Task:
    schedule, kind, kernel, steps = FAMILIES[name]
    torch.manual_seed(0)
    net = ResidualMLP((1, 3, 2), 4, width=32, depth=1, frequency=10.0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    policy = Policy(Denoiser(net, schedule, kind), kernel)
    return Task(policy, TimeGrid(steps), (1, 3, 2), torch.arange(4), lambda x: x, lambda x, c: x.mean((1, 2, 3)), "m")


def learned_by(config, name: str, updates: int = 15) -> tuple[float, float, float]:
    """The mean reward of the first and the last rollout, and the standard deviation of the first."""
    task, found = replace(family(name), rollout_spec=config.rollout_spec(FAMILIES[name][3])), []
    learner = config.learner(task, None, 1)
    for i in range(updates):
        found.append(learner.update(run_item(task, plan(1, i, 4, 50, 200, 4, i)[0])))
    return found[0]["reward"], found[-1]["reward"], found[0]["reward_std"]
