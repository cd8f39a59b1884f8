"""Walks of a prompt that begin with one noise, and longer steps after a window."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rollout_tasks import CLASSES, build, make_recipe

from rlfusion.diffusion.policy import Observation
from rlfusion.rollout import RolloutSpec, Task, Window, plan, run_item, transitions
from rlfusion.rollout.shared import Prompts
from rlfusion.rollout.trajectory import Trajectory, concatenate

PROMPTS, EACH = 2, 5
LATE = Window(1, 1, 1)
"""Of the stochastic steps 0, 1, 2 of four: in rollout n that of number n."""


def task_of(spec: RolloutSpec) -> Task:
    return replace(build(make_recipe().config, {}), rollout_spec=spec)


def walked(task: Task, iteration: int, size: int = PROMPTS * EACH) -> Trajectory:
    items = plan(3, iteration, PROMPTS, EACH, size, CLASSES, 0)
    return concatenate([run_item(task, item) for item in items])


@pytest.fixture
def rows(monkeypatch):
    """The rows of each call of the network."""
    found = []
    whole = Task.noisy_in

    def counted(task, item):
        net = task.policy.denoiser.net
        net._forward_hooks.clear()
        net.register_forward_hook(lambda _, given, __: found.append(len(given[0])))
        return whole(task, item)

    monkeypatch.setattr(Task, "noisy_in", counted)
    return found


@pytest.mark.parametrize("window", [None, LATE])
def test_walks_of_a_prompt_begin_with_one_noise_whatever_item_they_are_in(window):
    task = task_of(transitions(window, start="prompt"))
    whole, parts = (walked(task, 2, size) for size in (PROMPTS * EACH, 3))
    first = whole.x[:, 0].unflatten(0, (PROMPTS, EACH))
    assert (first == first[:, :1]).all()
    assert not torch.equal(first[0, 0], first[1, 0])
    assert torch.equal(parts.x[:, 0], whole.x[:, 0])
    torch.testing.assert_close(parts.x, whole.x)
    assert not torch.equal(walked(task, 3).x[0, 0], whole.x[0, 0])
    assert whole.x[:, -1].unique(dim=0).shape[0] == PROMPTS * EACH


def test_walks_begin_with_their_own_unless_told():
    assert walked(task_of(transitions(LATE)), 2).x[:, 0].unique(dim=0).shape[0] == PROMPTS * EACH


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_up_to_the_window_the_network_is_asked_for_one_walk_of_each_prompt(iteration, rows):
    task = task_of(transitions(LATE, start="prompt"))
    walked(task, iteration)
    assert rows == [PROMPTS] * iteration + [PROMPTS * EACH] * (4 - iteration)


def test_where_steps_take_noise_from_the_first_on_it_is_asked_for_all(rows):
    walked(task_of(transitions(start="prompt")), 0)
    assert rows == [PROMPTS * EACH] * 4


def test_they_are_the_walks_for_which_it_is_asked_one_by_one(monkeypatch):
    task = task_of(transitions(LATE, start="prompt"))
    once = walked(task, 2)
    monkeypatch.setattr(Prompts, "once", lambda self, policy, obs: policy(obs))
    each = walked(task, 2)
    torch.testing.assert_close(once.x, each.x)
    torch.testing.assert_close(once.log_prob, each.log_prob, equal_nan=True)
    assert torch.equal(once.log_prob.isnan(), each.log_prob.isnan())


@pytest.mark.parametrize(("iteration", "at"), [(0, [0, 1, 4]), (1, [0, 1, 2, 4]), (2, [0, 1, 2, 3, 4])])
def test_after_the_window_a_step_goes_as_far_as_several_of_the_chain(iteration, at):
    """Up to its end the walks are those without; then the ODE's formula by hand."""
    plain, task = task_of(transitions(LATE)), task_of(transitions(replace(LATE, leap=3)))
    usual, leaping, end = walked(plain, iteration), walked(task, iteration), iteration + 1
    assert torch.equal(leaping.times, usual.times[at])
    assert torch.equal(leaping.x[:, : end + 1], usual.x[:, : end + 1])
    assert torch.equal(leaping.log_prob[:, :end].nan_to_num(), usual.log_prob[:, :end].nan_to_num())
    assert leaping.log_prob[:, end:].isnan().all()
    schedule, x = task.policy.schedule, leaping.x[:, end]
    for k, (t, s) in enumerate(pairwise(leaping.times[end:]), end + 1):
        with torch.no_grad():
            told = task.policy.denoiser(x, t, leaping.cond)
        to = schedule(s)
        x = to.alpha.float() * told.x0 + to.sigma.float() * told.eps
        torch.testing.assert_close(leaping.x[:, k], x)
    assert not torch.equal(leaping.x[:, -1], usual.x[:, -1]) or at[-2] == 3


def test_rollouts_whose_windows_are_elsewhere_follow_each_other_in_one_task():
    task = task_of(transitions(replace(LATE, leap=2)))
    lengths = [len(walked(task, iteration).times) for iteration in (0, 1, 2, 0)]
    assert lengths == [4, 4, 5, 4]
    fresh = walked(task_of(transitions(replace(LATE, leap=2))), 0)
    assert torch.equal(walked(task, 0).x, fresh.x)


def test_without_conditions_all_walks_are_of_one_prompt():
    prompts = Prompts(plan(0, 0, 1, 4, 4, 1, 0)[0])
    noise = prompts.noise((2,))
    assert noise.shape == (4, 2)
    assert (noise == noise[0]).all()
    asked = []

    def policy(obs: Observation):
        asked.append(obs)
        return obs.x * 2, torch.zeros(())

    class Told(tuple):
        mean = property(lambda self: self[0])
        std = property(lambda self: self[1])

    found = prompts.once(lambda obs: Told(policy(obs)), Observation(noise, torch.ones(()), torch.zeros(()), None))
    assert asked[0].x.shape == (1, 2)
    assert asked[0].cond is None
    assert torch.equal(found.mean, 2 * noise)
