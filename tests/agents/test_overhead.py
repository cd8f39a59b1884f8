"""What rollouts and updates do beside the passes of the networks, counted in torch's operations: no clock, so that a
busy machine changes nothing. ``benchmarks/learner_overhead.py`` measures the same in time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from counted import counting
from outsides import Beside
from passes import Floor

from rlfusion.agents import AGENTS
from rlfusion.data import to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rl.guard import Config as Guards
from rlfusion.rl.guard import Guarded
from rlfusion.rollout import Task, plan, run_item

SHAPE, CLASSES, STEPS, WALKS = (1, 4, 4), 2, 4, 8
SETTINGS = {"qsm": {"critic_updates": 3, "critic_batch": 8}}


@cache
def made(name: str, micro_batch: int = 4) -> tuple[Callable[[], object], Callable[[], object]]:
    """A rollout and an update of an agent behind the guards, after the first ones."""
    torch.manual_seed(0)
    net = ResidualMLP(SHAPE, CLASSES, width=8)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = AGENTS[name](lr=1e-5, micro_batch=micro_batch, **SETTINGS.get(name, {}))
    policy = Policy(Denoiser(net, Cosine(), "v"), DDIM(1.0))
    spec = config.rollout_spec(STEPS)
    task = Task(policy, TimeGrid(STEPS), SHAPE, torch.arange(CLASSES), to_pixels, bright, "bright", rollout_spec=spec)
    task = replace(task, outside=Beside(policy, SHAPE))
    item = plan(0, 0, CLASSES, WALKS // CLASSES, WALKS, CLASSES, 0)[0]
    guarded = Guarded(config.learner(task, None, 0), Guards(log_ratio=1e9, grad_norm=1e9), None)
    acting = replace(task, policy=guarded.learner.policy)
    batch = run_item(acting, item)

    def update() -> None:
        guarded.update(replace(batch, version=guarded.learner.iteration))

    for _ in range(2):
        update()
    return lambda: run_item(acting, item), update


def bright(x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return x.mean((1, 2, 3))


def counts(call: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """The operations of a call, and those of the passes of the network in it."""
    floor = Floor(call, (ResidualMLP,))
    with counting() as ours:
        call()
    with counting() as bare:
        floor()
    return ours, bare


ABOVE = 0.15
RATIOS = {
    "ddpo": (1.52, 1.63),
    "grpo": (1.52, 1.63),
    "ppo": (1.52, 1.63),
    "awm": (1.37, 1.77),
    "nft": (1.37, 1.63),
    "dpo": (1.37, 1.7),
    "opd": (1.52, 1.38),
    "sft": (0.0, 1.35),
    "draft": (1.36, 1.47),
    "refl": (1.36, 1.41),
    "drwr": (1.52, 1.5),
    "qsm": (1.37, 1.25),
    "dawr": (1.52, 1.54),
}
"""Operations of a rollout and of an update over those of the passes of the network in them."""


def test_every_agent_has_its_ratios():
    assert RATIOS.keys() == set(AGENTS)


@pytest.mark.parametrize("name", RATIOS)
def test_no_more_is_done_beside_the_passes_of_the_network(name):
    for call, most in zip(made(name), RATIOS[name]):
        ours, bare = counts(call)
        if not most:  # no walk is taken: a state of noise is drawn, whatever the chain
            assert not sum(bare.values())
            continue
        assert sum(ours.values()) <= (most + ABOVE) * sum(bare.values())


@pytest.mark.parametrize("name", RATIOS)
def test_rollouts_and_updates_wait_no_oftener_for_more_calls_of_the_network(name):
    """What is read from the latents' device (float32) is read once an optimiser step, however small the calls are."""
    waits = []
    for micro_batch in (4, 8):
        update = made(name, micro_batch)[1]
        with counting(torch.float32) as ops:
            update()
        waits.append(sum(ops[name] for name in ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero")))
    assert waits[0] == waits[1]
