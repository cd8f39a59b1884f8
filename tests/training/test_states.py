"""States that do not fit what they are loaded into: every learner says so in one typed error that names the entry."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from distilled import settings_of, teaching

from rlfusion.agents import AGENTS
from rlfusion.common.errors import StateError
from rlfusion.data import Dataset, to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.distill import METHODS
from rlfusion.jobs import distill
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


def agent(name: str) -> Any:
    """A learner of an algorithm after its first update."""
    torch.manual_seed(0)
    net = ResidualMLP(SHAPE, CLASSES, width=4, depth=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    policy = Policy(Denoiser(net, Cosine(), "v"), DDIM(1.0))
    config = AGENTS[name](**SETTINGS.get(name, {}))
    task = Task(policy, TimeGrid(3), SHAPE, torch.arange(CLASSES), to_pixels, lambda x, c: x.mean((1, 2, 3)), "bright")
    task = replace(task, rollout_spec=config.rollout_spec(3))
    x = 2 * torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(1)) - 1
    learner = config.learner(task, Dataset(x, torch.arange(20) % CLASSES, ("a", "b")), 3)
    items = plan(3, 0, CLASSES, WALKS // CLASSES, 8, CLASSES, 0)
    learner.update(concatenate([run_item(replace(task, policy=learner.policy), item) for item in items]))
    return learner


def method(name: str) -> Any:
    """A learner of a distillation method after its first update."""
    settings = settings_of(name)
    given = teaching(settings)
    learner = distill.make_learner(settings, given)
    learner.update(next(iter(distill.batches(settings, given, 0))))
    return learner


PAIRED = ("dmd", "reflow", "regression")
"""Methods whose teacher makes pairs before: their learners are the others'."""
LEARNERS: dict[str, Callable[[], Any]] = {
    **{f"agent {name}": lambda name=name: agent(name) for name in AGENTS},
    **{
        f"method {name}": lambda name=name: method(name)
        for name in METHODS
        if name not in ("dmd", "reflow", "regression")
    },
}


def places(state: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every entry of nested mappings, outer ones first."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield (*path, key)
            yield from places(value, (*path, key))


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "text": lambda value: "x",
    "none": lambda value: None,
    "a list": lambda value: [1, 2],
    "a dict": lambda value: {"odd": 1},
    "another shape": lambda value: torch.zeros(7, 3, 1) if not isinstance(value, torch.Tensor) else value[None],
    "another dtype": lambda value: (
        value.to(torch.float16 if value.dtype != torch.float16 else torch.int8)
        if isinstance(value, torch.Tensor)
        else complex(1)
    ),
}
GONE, MORE = "missing", "one more"


def bent(state: dict, path: tuple, damage: str) -> dict:
    out = copy.deepcopy(state)
    *above, last = path
    held = out
    for key in above:
        held = held[key]
    if damage == GONE:
        del held[last]
    elif damage == MORE:
        held[f"{last}_"] = held[last]
    else:
        held[last] = DAMAGES[damage](held[last])
    return out


@pytest.mark.parametrize("name", LEARNERS)
def test_a_state_that_does_not_fit_is_named(name):
    learner = LEARNERS[name]()
    state = copy.deepcopy(learner.state_dict())
    found = list(places(state))
    draw = random.Random(name)
    for damage in (GONE, MORE, *DAMAGES):
        for path in draw.sample(found, min(5, len(found))):
            if damage == GONE and path[-2:-1] in (("state",), ("history",)):
                continue  # a parameter without a gradient has no moments, a prompt that never came no rewards
            with pytest.raises(StateError) as caught:
                learner.load_state_dict(bent(state, path, damage))
            text = str(caught.value)
            assert damage == "a dict" or any(str(key) in text for key in path), (path, damage, text)
            assert "\n" not in text
    learner.load_state_dict(state)
