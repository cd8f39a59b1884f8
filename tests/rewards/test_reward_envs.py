"""Rewards in Ray actors with runtime environments of their own: found there and nowhere else, the same bits."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from elsewhere import environment

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import Weights
from rlfusion.config import Base, Finetune, Ray, Rollout
from rlfusion.data import digits
from rlfusion.diffusion.chain import Chain
from rlfusion.jobs.parts import opened
from rlfusion.jobs.pretrain import card_of
from rlfusion.jobs.tasks import actors_of, from_actors, make_task, recipe
from rlfusion.rewards import RewardFailure, build, score, task_info
from rlfusion.rollout import Limits, make_backend, plan, ray_rewards, run_item
from rlfusion.rollout.ray_rewards import ActorReward, RewardActor
from rlfusion.rollout.reward_envs import require_possible

ELSEWHERE = """
import os

import torch


class Scaled:
    def __init__(self, prompts, power=1.0):
        self.factor, self.power, self.lengths = float(os.environ["FACTOR"]), power, [len(p) for p in prompts]

    def __call__(self, samples, cond):
        if bool((samples > 5).any()):
            os._exit(1)
        lengths = torch.tensor([self.lengths[int(c)] for c in cond])
        return self.factor * samples.mean((1, 2, 3)) ** self.power + lengths
"""


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "only_there.py").write_text(ELSEWHERE)
    return folder


NAME = "only_there:Scaled"
AGED = "aged:by_age"
PAIRS = """
import torch

from rlfusion.rewards import PairWise


@PairWise
def brighter(a, b, cond):
    return torch.sigmoid(10 * (a.mean((1, 2, 3)) - b.mean((1, 2, 3))))
"""


@pytest.fixture
def older(tmp_path, monkeypatch) -> str:
    """The Python of an environment with version 1 of a library, of which this process has version 2; a reward by it."""
    (tmp_path / "rival.py").write_text("VERSION = 2")
    (tmp_path / "aged.py").write_text(
        "import rival\n\n\ndef by_age(samples, cond):\n    return rival.VERSION * samples.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield str(environment(tmp_path / "older", rival="VERSION = 1"))
    for name in ("rival", "aged"):
        sys.modules.pop(name, None)


@pytest.mark.alone
def test_a_reward_runs_in_the_environment_that_is_asked_for(package, older, tmp_path, monkeypatch):
    """One in an environment that Ray makes, one in a virtual environment whose library conflicts with ours."""
    monkeypatch.setattr(ray_rewards, "RESTARTS", 0)
    env = {"working_dir": str(package), "env_vars": {"FACTOR": "3"}}
    config = Finetune(
        pretrain=Base(model=models.Config(net="ResidualMLP(width=8, depth=1)")),
        reward={NAME: 1.0, AGED: 0.0},
        reward_options={NAME: {"power": 2.0}},
        chain=Chain(steps=2),
        rollout=Rollout(prompts=2, samples_per_prompt=3, item=6, workers=1),
        ray=Ray(reward_envs={NAME: env, AGED: {"py_executable": older}}, limits=Limits(item_s=300)),
    )
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, known = torch.arange(6) % 2, task_info(("a", "four"), (1, 8, 8))
    with pytest.raises(ConfigError, match="no module 'only_there'"):
        build(NAME)
    parts = opened(config)
    with actors_of(parts.workers, parts.rewards.given) as actors:
        with pytest.raises(ConfigError, match=rf"'{NAME}' does not start .*needs the options \['prompts'\]"):
            ActorReward(NAME, actors[NAME], {}, 300.0)
        reward = ActorReward(NAME, actors[NAME], known, 300.0)
        assert torch.equal(reward(x, cond), 3.0 * x.mean((1, 2, 3)) ** 2.0 + torch.tensor([1, 4] * 3))
        assert not reward.groups
        aged = ActorReward(AGED, actors[AGED], known, 300.0)
        assert torch.equal(aged(x, cond), x.mean((1, 2, 3)))
        assert torch.equal(build(AGED)(x, cond), 2 * x.mean((1, 2, 3)))
        _the_walks_of_a_worker_have_its_bits(config, actors)
        monkeypatch.chdir(tmp_path)
        _so_have_those_of_a_pairwise_reward_in_a_file(config, tmp_path)
        with pytest.raises(RewardFailure, match="6 of 6 samples: its Ray actor failed: "):
            score(reward, x + 10, cond, "it")  # it dies of this
    assert "FACTOR" not in os.environ


def _the_walks_of_a_worker_have_its_bits(config, actors):
    """One item by a Ray worker that asks the actor, and by ourselves with the reward at home."""

    def at_home(samples, cond):
        return 3.0 * samples.mean((1, 2, 3)) ** 2.0 + 1  # each digit's name is of one letter

    _alike(config, from_actors(actors, task_info(digits().names, (1, 8, 8)), 300.0), actors, at_home)


def _so_have_those_of_a_pairwise_reward_in_a_file(config, folder):
    (folder / "pairs.py").write_text(PAIRS)
    name = "pairs.py:brighter"  # from this folder, where the worker is not
    config = replace(config, reward={name: 1.0}, reward_options={}, ray=Ray(limits=config.ray.limits))
    _alike(config, {}, {}, build(name))


def _alike(config, made, actors, at_home):
    """One item by a worker, of the rewards ``made`` and of those that it makes itself, and by ourselves."""
    card = card_of(config.pretrain, digits())
    policy = config.chain.policy(models.build(card), card.names)
    reward = build(config.reward, {}, made=made)
    item, weights = plan(0, 0, 2, 3, 6, card.classes, 0)[0], Weights.of(policy, 0)
    parts = opened(config)
    made = recipe(parts.task, parts.workers, card, policy, reward, torch.device("cpu"), actors)
    with make_backend(made, config.settings) as backend:
        (away,) = backend.collect([item], weights)
    home = run_item(make_task(parts.task, card, policy, at_home), item)
    assert torch.equal(away.x, home.x)
    assert torch.equal(away.reward, home.reward)


def test_an_environment_that_cannot_be_is_refused_before_ray_tries(older, tmp_path, monkeypatch):
    require_possible("it", {"py_executable": older})
    require_possible("it", {"working_dir": "absent", "env_vars": {}})
    with pytest.raises(ConfigError, match=r"ray.reward_envs\['it'\]: py_executable = 'absent/python' cannot be run"):
        require_possible("it", {"py_executable": "absent/python"})
    other = tmp_path / "python"
    for says, told in (
        ('echo "No module named rlfusion" >&2; exit 1', r"has not what a reward needs \(No module named rlfusion\)"),
        ('echo \'{"Python": "2.7", "Ray": "1"}\'', rf"has Python 2\.7: expected {sys.version_info[0]}\."),
        (f'{older} -c "$2" | sed \'s/"Ray": "/&0./\'', r"has Ray 0\.\d.*: expected \d"),
    ):
        other.write_text(f"#!/bin/sh\n{says}\n")
        other.chmod(0o700)
        with pytest.raises(ConfigError, match=told):
            require_possible("it", {"py_executable": str(other)})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for key in ("pip", "uv"):
        with pytest.raises(ConfigError, match=rf"{key} needs virtualenv.*, which .* has not: expected pip install"):
            require_possible("it", {key: ["a-package==1"]})


def test_settings_of_environments():
    env = {"env_vars": {"A": "1"}}
    with pytest.raises(ConfigError, match=r"unknown reward in ray.reward_envs 'inc': .*did you mean 'ink'"):
        Finetune(reward="ink", ray=Ray(reward_envs={"inc": env}), rollout=Rollout(workers=1))
    with pytest.raises(ConfigError, match=r"rollout.workers = 0 with ray.reward_envs"):
        Finetune(reward="ink", ray=Ray(reward_envs={"ink": env}))


def test_a_reward_s_time_limit_lies_within_the_shortest_lease():
    limits = Ray(limits=Limits(item_floor_s=60))
    for late in (60.0, 61.0):
        with pytest.raises(ConfigError, match=rf"reward_timeout_s = {late:g}: .*ray.limits.item_floor_s = 60"):
            Finetune(reward="ink", reward_timeout_s=late, ray=limits, rollout=Rollout(workers=1))
        Finetune(reward="ink", reward_timeout_s=late, ray=limits)  # no worker, no item_s
    Finetune(reward="ink", reward_timeout_s=59.0, ray=limits, rollout=Rollout(workers=1))


BY_AGE = """
def by_age(images, metadata):
    return images.new_tensor([held["age"] for held in metadata])
"""


class Reference(NamedTuple):
    """A method of an actor in this process."""

    remote: Callable[[bytes], Any]


class Local:
    """A ``RewardActor`` in this process, as a handle of Ray shows it; ``restart`` is what Ray does where it dies."""

    def __init__(self) -> None:
        self.greeted = 0
        self.restart()

    def restart(self) -> None:
        self.actor = RewardActor("told_ages:by_age", {}, [], 1, False, {})

    @property
    def hello(self) -> Reference:
        self.greeted += 1
        return Reference(self.actor.hello)

    @property
    def score(self) -> Reference:
        return Reference(self.actor.score)


def test_an_actor_that_was_started_anew_is_told_the_prompts_again(tmp_path, monkeypatch):
    (tmp_path / "told_ages.py").write_text(BY_AGE)
    monkeypatch.syspath_prepend(tmp_path)
    actor = Local()
    monkeypatch.setattr(ray_rewards.ray, "get_actor", lambda name: actor)
    monkeypatch.setattr(ray_rewards.ray, "get", lambda answer, timeout: answer)
    told = task_info(("a", "b"), (1, 8, 8), ({"age": 1}, {"age": 5}))
    reward, samples, cond = ActorReward("it", ["it"], told, 9.0), torch.rand(3, 1, 8, 8), torch.tensor([1, 0, 1])
    assert actor.greeted == 1
    for greeted in (1, 2):
        assert reward(samples, cond).tolist() == [5.0, 1.0, 5.0]
        assert actor.greeted == greeted
        actor.restart()
