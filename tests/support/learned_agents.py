"""A small learner of every algorithm, after its first update."""

from dataclasses import replace
from typing import Any

import torch
from outsides import Beside

from rlfusion.agents import AGENTS
from rlfusion.data import Dataset, to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.trajectory import concatenate

SHAPE, CLASSES, WALKS = (1, 2, 2), 2, 8
SETTINGS: dict[str, dict] = {
    "ddpo": {"advantage": "prompt", "kl_loss": 0.1},
    "grpo": {"kl_loss": 0.1},
    "drwr": {"memory": 16, "on": "chain"},
    "draft": {"kl_loss": 0.1},
}


def images() -> Dataset:
    x = 2 * torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(1)) - 1
    return Dataset(x, torch.arange(20) % CLASSES, ("a", "b"))


def learned(name: str) -> tuple[Any, dict[str, float]]:
    """A learner of an algorithm after its first update, and what that has told."""
    torch.manual_seed(0)
    net = ResidualMLP(SHAPE, CLASSES, width=4, depth=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    policy = Policy(Denoiser(net, Cosine(), "v"), DDIM(1.0))
    config = AGENTS[name](**SETTINGS.get(name, {}))
    task = Task(policy, TimeGrid(3), SHAPE, torch.arange(CLASSES), to_pixels, lambda x, c: x.mean((1, 2, 3)), "bright")
    task = replace(task, rollout_spec=config.rollout_spec(3), outside=Beside(policy, SHAPE))
    learner = config.learner(task, images(), 3)
    items = plan(3, 0, CLASSES, WALKS // CLASSES, 8, CLASSES, 0)
    walks = concatenate([run_item(replace(task, policy=learner.policy), item) for item in items])
    return learner, learner.update(walks)
