"""Rewards that are computed while the next item is walked: the same numbers, errors and questions, in less time."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rollout_tasks import CLASSES, assert_identical, build, make_policy, make_recipe
from tiny_runs import TINY

import rlfusion as rlf
from rlfusion.agents import AGENTS
from rlfusion.cli import main
from rlfusion.common.errors import ConfigError, UserCodeError
from rlfusion.common.weights import Weights
from rlfusion.config import Finetune
from rlfusion.config.parts import Learners, Rollout
from rlfusion.jobs.finetune import run as job_run
from rlfusion.rewards import CallOptions, RewardError, WeightedSum
from rlfusion.rollout import Local, RolloutSpec, Settings, Task, WorkItem, make_backend, plan, samples
from rlfusion.rollout.rollout_spec import Trained
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.stages import Stages, counting

WAIT_S = 30.0
ITEMS = plan(11, 2, 3, 4, 5, CLASSES, 5)


def task_of(reward: Callable | None = None, **changes) -> Task:
    task = build(make_recipe().config, {})
    return replace(task, reward=reward or task.reward, **changes)


def collected(task: Task, overlap: bool, items: list[WorkItem] = ITEMS) -> list[Trajectory]:
    return Local(task, overlap).collect(items, Weights.of(make_policy(), 5))


def bright(samples: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return samples.flatten(1).mean(1)


def walked_as_scored(task: Task, overlap: bool) -> list[Trajectory]:
    """With a reward of the first item that waits until the second one's walk has begun."""
    begun, forward = threading.Event(), task.policy.denoiser.net.forward
    calls = []

    def called(*args):
        calls.append(len(args[0]))
        if len(calls) > 4:
            begun.set()
        return forward(*args)

    def reward(samples, cond):
        if not begun.wait(WAIT_S if overlap else 0.01):
            raise ValueError("nobody walks")
        return bright(samples, cond)

    task.policy.denoiser.net.forward = called
    return collected(replace(task, reward=reward), overlap)


def test_an_item_is_walked_while_the_one_before_is_scored():
    found = walked_as_scored(task_of(), True)
    for one, other in zip(found, collected(task_of(), False), strict=True):
        assert_identical(one, other)
    with pytest.raises(UserCodeError, match="nobody walks"):
        walked_as_scored(task_of(), False)


@pytest.mark.parametrize("items", [ITEMS[:1], ITEMS, plan(3, 0, 3, 4, 2, CLASSES, 5)])
@pytest.mark.parametrize("spec", [RolloutSpec(), samples(4), RolloutSpec(trained=Trained())])
def test_the_walks_and_rewards_are_the_same(spec, items):
    one, other = (collected(task_of(rollout_spec=spec), overlap, items) for overlap in (True, False))
    for a, b in zip(one, other, strict=True):
        assert_identical(a, b)
        if spec.trained is not None:
            assert a.mean.requires_grad
            assert torch.equal(a.mean, b.mean)


def test_each_item_has_the_terms_and_the_cache_of_its_own_samples():
    def dark(samples, cond):
        return 1 - bright(samples, cond)

    twice = [*ITEMS, *ITEMS]
    found = {}
    for overlap in (True, False):
        cached = CallOptions(cache=1000).around(dark, "dark", "dark")
        found[overlap] = collected(
            task_of(WeightedSum({"a": bright, "b": cached}, {"a": 1.0, "b": 2.0})), overlap, twice
        )
    for a, b in zip(found[True], found[False], strict=True):
        assert_identical(a, b)
    assert not torch.equal(found[True][0].terms, found[True][1].terms)
    assert [float(walks.cached.mean()) for walks in found[True]] == [0.0] * 3 + [1.0] * 3


def test_the_reward_is_asked_in_order_and_once_at_a_time():
    asked, busy = [], threading.Lock()

    def reward(samples, cond):
        assert busy.acquire(blocking=False)
        asked.append(samples.clone())
        busy.release()
        return bright(samples, cond)

    collected(task_of(reward), True)
    threads = asked[:]
    asked.clear()
    collected(task_of(reward), False)
    assert all(torch.equal(a, b) for a, b in zip(threads, asked, strict=True))


def test_of_two_errors_that_of_the_first_item_is_raised_and_named():
    task, calls = task_of(), []

    def reward(samples, cond):
        return torch.full((len(samples),), torch.nan)

    def forward(*args):
        calls.append(args)
        if len(calls) > 4:
            raise ValueError("the second item fails")
        return torch.zeros_like(args[0])

    task.policy.denoiser.net.forward = forward
    with pytest.raises(RewardError, match="brightness") as caught:
        collected(replace(task, reward=reward), True)
    assert caught.value.__notes__ == [f"in {ITEMS[0]}"]
    calls.clear()
    with pytest.raises(ValueError, match="the second item fails") as caught:
        collected(task, True)
    assert caught.value.__notes__ == [f"in {ITEMS[1]}"]


def test_a_failed_rollout_can_be_asked_for_again():
    answers = iter([torch.nan])

    def reward(samples, cond):
        return bright(samples, cond) + next(answers, 0.0)

    backend = Local(task_of(reward), overlap=True)
    pending = backend.submit(ITEMS, Weights.of(make_policy(), 5))
    with pytest.raises(RewardError):
        pending()
    for a, b in zip(pending(), collected(task_of(), False), strict=True):
        assert_identical(a, b)


def test_gradients_are_off_in_the_thread():
    def reward(samples, cond):
        assert not torch.is_grad_enabled()
        return bright(samples, cond)

    assert len(collected(task_of(reward), True)) == len(ITEMS)


def test_what_is_waited_for_is_the_rewards_time():
    with counting(Stages()) as stages:
        collected(task_of(), True)
    assert stages.taken().keys() == {"reward"}


def test_the_settings_reach_the_backend():
    assert make_backend(make_recipe(), Settings(overlap=True)).overlap
    assert not make_backend(make_recipe(), Settings()).overlap
    assert Finetune(rollout=Rollout(overlap=True)).settings.overlap
    assert not Finetune().settings.overlap


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"agent": AGENTS["draft"]()}, "agent 'draft', which scores as it learns, sample by sample, expected false"),
        (
            {"learner": Learners(ranks=2, shares=2, shard="fsdp")},
            "learner.shard = fsdp: all ranks walk in step, expected",
        ),
    ],
)
def test_where_nothing_would_overlap_it_is_refused(settings, told):
    with pytest.raises(ConfigError, match=f"rollout.overlap = True with {told}"):
        Finetune(rollout=Rollout(overlap=True), **settings)


def test_with_workers_it_is_refused():
    with pytest.raises(ConfigError, match=r"rollout.overlap = True with rollout.workers = 2: .*, expected false, or 0"):
        Rollout(overlap=True, workers=2)


def weights(folder: Path) -> bytes:
    return (folder / "model" / "weights.safetensors").read_bytes()


def test_a_run_has_the_same_bits_whether_resumed_with_or_without_it(tiny_root):
    small = ("--rollout.item", 3, "--updates", 2, "--checkpoint_every", 1, "--monitor.every", 0)
    for name, more in {"without": (), "within": ("--rollout.overlap", "true", "--updates", 1)}.items():
        command = ("finetune", "--root", tiny_root, "--name", name, *TINY, *small, *more)
        assert main.main([str(word) for word in command]) == 0
    again = ["finetune", "--resume", str(tiny_root / "within"), "--change", "updates=2"]
    assert main.main(again) == 0
    assert "overlap: true" in (tiny_root / "within" / "config.yaml").read_text()
    assert weights(tiny_root / "within") == weights(tiny_root / "without")


def test_walks_in_this_process_follow_it_in_every_kind_of_run(tiny_root, monkeypatch):
    rollout = {"prompts": 2, "samples_per_prompt": 4, "overlap": True}
    run = rlf.finetune(str(tiny_root / "first"), reward="ink", rollout=rollout, root=str(tiny_root))
    assert run._collector.backend.overlap
    monkeypatch.setattr(job_run, "acting_here", lambda *args: args)
    parts = SimpleNamespace(parts=SimpleNamespace(task=None), card=None, policy=None, reward=None)
    for overlap in (True, False):
        job = SimpleNamespace(**vars(parts), config=Finetune(rollout=Rollout(overlap=overlap)))
        assert job_run._acting(job)[-1] is overlap
