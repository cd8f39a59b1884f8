"""One learner code, every policy: each algorithm trains each family of models, named nowhere for the combination."""

import copy
from dataclasses import replace

import pytest
import torch
from outsides import Beside

from rlfusion.agents import AGENTS
from rlfusion.data import Dataset, to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, FlowSDE, Renoise
from rlfusion.diffusion.kinds import CM, TrigFlow
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import DDPM, Cosine, Karras, Rectified, Trig
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rl.agent import Plan
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.trajectory import concatenate

SHAPE, CLASSES, SEED, WALKS, UPDATES = (1, 4, 4), 3, 5, 24, 2
POLICIES = {
    "eps": (DDPM(), "eps", DDIM(1.0), 4),
    "v": (Cosine(), "v", DDIM(1.0), 4),
    "flow": (Rectified(), "flow", FlowSDE(0.7), 4),
    "trigflow": (Trig(), TrigFlow(), DDIM(1.0), 4),
    "consistency, 2 steps": (Karras(), CM(sigma_data=0.75), Renoise(floor=0.002), 2),
}
"""Schedule, kind, kernel, steps."""


def data() -> Dataset:
    draw = torch.Generator().manual_seed(1)
    return Dataset(2 * torch.rand(60, *SHAPE, generator=draw) - 1, torch.arange(60) % CLASSES, ("a", "b", "c"))


def task_of(family: str) -> tuple[Task, list[int]]:
    """A task of that family, and how many samples each call of its reward had."""
    schedule, kind, kernel, steps = POLICIES[family]
    torch.manual_seed(0)
    net, asked = ResidualMLP(SHAPE, CLASSES, width=16, depth=1), []
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def bright(samples, cond):
        asked.append(len(samples))
        return samples.mean((1, 2, 3))

    policy = Policy(Denoiser(net, schedule, kind), kernel)
    task = Task(policy, TimeGrid(steps), SHAPE, torch.arange(CLASSES), to_pixels, bright, "bright")
    return replace(task, outside=Beside(policy, SHAPE)), asked


@pytest.mark.parametrize("family", POLICIES)
@pytest.mark.parametrize("agent", AGENTS)
def test_every_learner_trains_every_family(agent, family):
    task, asked = task_of(family)
    steps, config = POLICIES[family][3], AGENTS[agent]()
    config.check(Plan(CLASSES, WALKS // CLASSES, 0, steps))
    task = replace(task, rollout_spec=config.rollout_spec(steps))
    learner = config.learner(task, data(), SEED)
    before = copy.deepcopy(dict(task.policy.named_parameters()))
    asked.clear()
    for iteration in range(UPDATES):
        acting = replace(task, policy=learner.policy)
        items = plan(SEED, iteration, CLASSES, WALKS // CLASSES, 10, CLASSES, iteration)
        metrics = learner.update(concatenate([run_item(acting, item) for item in items]))
        assert all(torch.tensor(value).isfinite() for value in metrics.values()), metrics
    after = dict(task.policy.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    unmoved = [name for name, p in after.items() if torch.equal(p, before[name])]
    assert not unmoved
    assert learner.queries == sum(asked)
    assert (learner.queries >= UPDATES * WALKS) == (agent != "sft")  # which learns from stored images
    assert learner.iteration == UPDATES
