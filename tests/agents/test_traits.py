"""What an agent says of itself before there is a learner, against the learner that it makes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from outsides import Beside
from torch import nn

from rlfusion import agents
from rlfusion.agents import AGENTS
from rlfusion.data import to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rl.agent import Clip, Traits
from rlfusion.rollout import Task

SHAPE, CLASSES, STEPS = (1, 4, 4), 2, 4
ASKED = {
    "ddpo": [{"kl_loss": 0.1}, {"kl_reward": 0.1, "kl_loss": 0.0}, {"kl_loss": 0.0}],
    "grpo": [{"kl_loss": 0.1}, {"kl_loss": 0.0}, {"kl_loss": 0.1, "reference_every": 2}],
    "ppo": [{"kl_loss": 0.1}, {"kl_loss": 0.0}],
    "awm": [{"kl_loss": 0.1}, {"kl_loss": 0.0}],
    "nft": [{"kl": 0.1}, {"kl": 0.0}],
    "dpo": [{}, {"data": "pairs"}],
    "sft": [{"kl": 0.1}, {"kl": 0.0}],
    "opd": [{"teacher_guidance": 2.0}, {"teacher": "one"}, {"teacher": "one", "kl_std": 0.1}],
    "draft": [{}, {"kl_loss": 0.1}],
    "refl": [{}, {"kl_loss": 0.1}],
    "drwr": [{}, {"kl": 0.1}, {"on": "noised"}],
    "dawr": [{}, {"kl": 0.1}, {"advantage": "prompt"}, {"on": "noised"}],
    "qsm": [{}, {"q": "denoised"}, {"critic": "ResidualMLP(width=8, depth=1)"}],
}
CASES = [(name, settings) for name, cases in ASKED.items() for settings in cases]


def held(thing: Any, met: set[int]) -> Iterator[nn.Module]:
    """Every policy that a learner has, through whatever parts."""
    if id(thing) in met:
        return
    met.add(id(thing))
    if isinstance(thing, Policy):
        yield thing
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from held(part, met)
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from held(part, met)
    elif type(thing).__module__.startswith("rlfusion") and hasattr(thing, "__dict__"):
        yield from held(vars(thing), met)


def made(name: str, settings: dict[str, Any]) -> tuple[Traits, Any, Task]:
    torch.manual_seed(0)
    policy = Policy(Denoiser(ResidualMLP(SHAPE, CLASSES, width=8), Cosine(), "v"), DDIM(1.0))
    config = AGENTS[name](**settings)
    spec = config.rollout_spec(STEPS)
    task = Task(policy, TimeGrid(STEPS), SHAPE, torch.arange(CLASSES), to_pixels, bright, "bright", rollout_spec=spec)
    task = replace(task, outside=Beside(policy, SHAPE))
    return config.traits(), config.learner(task, None, 0), task


def bright(x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return x.mean((1, 2, 3))


def test_every_agent_is_asked():
    assert set(ASKED) == set(agents.NAMES)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_copies_are_those_that_the_learner_has(name, settings):
    traits, learner, task = made(name, settings)
    own = {next(policy.parameters()).data_ptr() for policy in held(learner, {id(task)})}
    beside = own - {next(task.policy.parameters()).data_ptr()}
    assert len(beside) == traits.copies + traits.teacher


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_critic_is_told_where_there_is_one(name, settings):
    traits, learner, _ = made(name, settings)
    assert bool(traits.critic) == (getattr(learner, "critic", None) is not None)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_an_average_is_told_where_one_is_kept(name, settings, decay):
    traits, learner, _ = made(name, {**settings, "ema_decay": decay})
    assert traits.averaged == bool(learner.optimization.ema.state_dict()["shadow"]) == (decay > 0)


def test_what_is_learned_from():
    told = {name: AGENTS[name]().traits().rewards for name in agents.NAMES if name != "sft"}
    assert told == {name: "watched" if name == "opd" else "learned" for name in told}
    assert AGENTS["dpo"](data="pairs").traits().rewards == AGENTS["sft"](data="images").traits().rewards == "none"


def test_the_usual_names_of_a_stranger_are_read(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Mine:\n"
        "    kl_loss: float = 0.5\n"
        "    epochs: int = 3\n"
        "    micro_batch: int = 5\n"
        "    optimizer: str = 'sgd()'\n"
        "    ema_decay: float = 0.5\n"
        "    clip_low: float = 0.1\n"
        "    clip_high: float = 0.3\n"
        "    def rollout_spec(self, steps): ...\n"
        "    def learner(self, task, data, seed): ...\n"
    )
    stranger = AGENTS.find(f"{file}:Mine").object()
    assert stranger.traits() == Traits(passes=3, copies=1, rows=5, optimizer="sgd()", averaged=True, clip=Clip(0.1))
    assert stranger.for_pipelines({}) == {}


def test_unusual_names_are_as_if_they_were_not_there(tmp_path):
    file = tmp_path / "bare.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Bare:\n"
        "    strength: float = 0.5\n"
        "    def rollout_spec(self, steps): ...\n"
        "    def learner(self, task, data, seed): ...\n"
    )
    assert AGENTS.find(f"{file}:Bare").object().traits() == Traits()


def test_which_losses_are_a_denoisers():
    told = {name: AGENTS[name](**({"data": "images"} if name == "sft" else {})).traits().denoises for name in ASKED}
    assert {name for name, denoises in told.items() if denoises} == {"awm", "nft", "dpo", "sft"}
    assert AGENTS["drwr"](on="noised").traits().denoises
