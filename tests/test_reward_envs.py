"""Rewards in Ray actors with runtime environments of their own: found there and nowhere else, the same bits."""

import os

import pytest
import torch
from conftest import TINY
from processes import rlfusion

from rlfusion.config import Finetune, Ray, Rollout
from rlfusion.errors import ConfigError
from rlfusion.rewards import RewardFailure, build, facts, score
from rlfusion.rollout import ray_rewards
from rlfusion.rollout.ray_rewards import ActorReward, reward_actors

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


def test_a_reward_runs_in_the_environment_that_is_asked_for(package, monkeypatch):
    monkeypatch.setattr(ray_rewards, "RESTARTS", 0)
    envs = {"only_there:Scaled": {"working_dir": str(package), "env_vars": {"FACTOR": "3"}}}
    options = {"only_there:Scaled": {"power": 2.0}}
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, known = torch.arange(6) % 2, facts(("a", "four"), (1, 8, 8))
    with pytest.raises(ConfigError, match="no module 'only_there'"):
        build("only_there:Scaled")
    with reward_actors(envs, options, "", 1, 0, 0.0, 1) as actors:
        actor = actors["only_there:Scaled"]
        with pytest.raises(ConfigError, match=r"'only_there:Scaled' does not start .*needs the options \['prompts'\]"):
            ActorReward("only_there:Scaled", actor, {}, 300.0)
        reward = ActorReward("only_there:Scaled", actor, known, 300.0)
        expected = 3.0 * x.mean((1, 2, 3)) ** 2.0 + torch.tensor([1, 4] * 3)
        assert torch.equal(reward(x, cond), expected)
        assert not reward.groups
        with pytest.raises(RewardFailure, match="6 of 6 samples: its Ray actor failed: "):
            score(reward, x + 10, cond, "it")  # it dies of this


def test_settings_of_environments():
    env = {"env_vars": {"A": "1"}}
    with pytest.raises(ConfigError, match=r"unknown reward in ray.reward_envs 'inc': .*did you mean 'ink'"):
        Finetune(reward="ink", ray=Ray(reward_envs={"inc": env}), rollout=Rollout(workers=1))
    with pytest.raises(ConfigError, match=r"rollout.workers = 0 with ray.reward_envs"):
        Finetune(reward="ink", ray=Ray(reward_envs={"ink": env}))


def test_a_run_with_such_a_reward_has_the_bits_of_one_at_home(tiny_root, tmp_path, package):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    (tmp_path / "here.py").write_text(ELSEWHERE.replace('float(os.environ["FACTOR"])', "3.0"))
    more = (*TINY, "--monitor.every", 0, "--updates", 2)
    home = rlfusion(tmp_path, "finetune", *more, "--reward", "here:Scaled", "--name", "home")
    assert home.code == 0, home.err
    envs = repr({"only_there:Scaled": {"working_dir": str(package), "env_vars": {"FACTOR": "3"}}})
    away = (
        "--reward",
        "only_there:Scaled",
        "--ray.reward_envs",
        envs,
        "--rollout.workers",
        1,
        "--name",
        "away",
        "--ray.limits.item_s",
        300,
    )
    said = rlfusion(tmp_path, "finetune", *more, *away)
    assert said.code == 0, said.err
    files = [tmp_path / "runs" / name / "model" / "weights.safetensors" for name in ("home", "away")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "FACTOR" not in os.environ
