"""A small denoiser of a two-mode mixture on the plane, and how learners through a reward's gradient fare on it."""

import copy
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from rlfusion import pretrain
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout import Task, plan, run_item, samples

STEPS, WALKS, SEED = 8, 64, 1
MODES = torch.tensor([[-0.6, 0.0], [0.6, 0.0]])
STD = 0.15


def plane_data(n: int = 2000) -> Dataset:
    """Points of N(mode, STD^2), the modes in turn, of one class."""
    draw = torch.Generator().manual_seed(0)
    x = MODES[torch.arange(n) % 2] + STD * torch.randn(n, 2, generator=draw)
    return Dataset(x[:, None, None], torch.zeros(n, dtype=torch.int64), ("all",))


@lru_cache(maxsize=1)
def _pretrained() -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(ResidualMLP((1, 1, 2), classes=1, width=64, depth=2), Cosine(), "v")
    config = pretrain.Config(steps=500, batch=256, lr=5e-3, ema="Constant(decay=0)", label_dropout=0.0)
    learner = pretrain.Learner(denoiser, plane_data(), config)
    for step in range(config.steps):
        learner.update(step)
    return denoiser


def right(x: Tensor, cond: object = None) -> Tensor:
    """How near a point is to the right-hand mode: -|x - m|^2."""
    return -(x.flatten(1) - MODES[1]).square().sum(1)


def plane_task() -> Task:
    """A chain of its own on the denoiser."""
    policy = Policy(copy.deepcopy(_pretrained()), DDIM(1.0))
    return Task(policy, TimeGrid(STEPS), (1, 1, 2), torch.arange(1), lambda x: x, right, "right")


def ends(task: Task, n: int = 400) -> Tensor:
    """(n, 2) fresh samples."""
    return run_item(replace(task, rollout_spec=samples(STEPS)), plan(99, 0, 1, n, n, 1, 0)[0]).x[:, 0].flatten(1)


def fraction_near(task: Task) -> float:
    """The share of samples within 4 standard deviations of the right-hand mode."""
    return ((ends(task) - MODES[1]).norm(dim=1) < 4 * STD).float().mean().item()


def rewarded(task: Task, config, updates: int) -> float:
    """Fine-tune in place; the standard deviation of the samples afterwards."""
    learner = config.learner(task, plane_data(), SEED)
    for i in range(updates):
        item = plan(SEED, i, 1, WALKS, WALKS, 1, i)[0]
        learner.update(run_item(replace(task, rollout_spec=config.rollout_spec(STEPS)), item))
    return ends(task).std(0).mean().item()


def assert_learns(plain, held) -> None:
    """Both settings move all samples to the rewarded mode; those of ``held`` keep more of its spread."""
    assert 0.35 < fraction_near(plane_task()) < 0.65
    spreads = []
    for config in (plain, held):
        task = plane_task()
        spreads.append(rewarded(task, config, updates=25))
        assert fraction_near(task) > 0.95
    assert spreads[1] > 1.5 * spreads[0]
