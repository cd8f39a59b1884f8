"""What workers run and keep of a walk is the part that was asked for, the same whatever else is asked for."""

import math
from dataclasses import replace

import pytest
import torch
from rollout_tasks import CLASSES, build, make_recipe

from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.rollout import RolloutSpec, kept, plan, prefix, run_item, samples, transitions
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.rollout.wire import from_wire, to_wire

RECIPE = make_recipe()
STEPS = 4


def collected(rollout_spec: RolloutSpec, item: int = 12) -> Trajectory:
    task = replace(build(RECIPE.config, {}), rollout_spec=rollout_spec)
    return concatenate([run_item(task, work) for work in plan(11, 2, 3, 4, item, CLASSES, 5)])


WHOLE = collected(transitions())


def test_samples_are_the_ends_of_the_whole_walks_with_their_rewards():
    kept = collected(samples(STEPS))
    torch.testing.assert_close(kept.x[:, 0], WHOLE.x[:, -1], rtol=0, atol=0)
    torch.testing.assert_close(kept.reward, WHOLE.reward, rtol=0, atol=0)
    assert kept.log_prob is None
    assert kept.begin.tolist() == [STEPS] * 12


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_prefix_is_the_state_before_its_step_and_is_not_scored(step):
    kept = collected(prefix(step, step))
    torch.testing.assert_close(kept.x[:, 0], WHOLE.x[:, step], rtol=0, atol=0)
    assert (kept.reward, kept.log_prob) == (None, None)


def test_a_random_prefix_is_drawn_per_sample_whatever_the_item_size():
    kept, other = collected(prefix(1, 3)), collected(prefix(1, 3), item=5)
    assert set(kept.begin.tolist()) == {1, 2, 3}
    torch.testing.assert_close(kept.x[:, 0], WHOLE.x[torch.arange(12), kept.begin], rtol=0, atol=0)
    assert torch.equal(kept.begin, other.begin)


def test_a_part_crosses_the_wire_whole():
    kept = collected(prefix(1, 3))
    back = from_wire(*to_wire(kept))
    assert torch.equal(back.x, kept.x)
    assert torch.equal(back.begin, kept.begin)
    assert back.reward is None


def test_ends_that_nobody_wants_scored_are_not_but_have_to_be_finite():
    task = replace(build(RECIPE.config, {}), rollout_spec=prefix(STEPS, STEPS), reward=None)
    item = plan(11, 2, 3, 4, 12, CLASSES, 5)[0]
    assert torch.equal(run_item(task, item).x[:, 0], WHOLE.x[:, -1])
    torch.nn.init.constant_(task.policy.denoiser.net.leave.bias, math.inf)
    with pytest.raises(NumericalError, match="not finite"):
        run_item(task, item)


@pytest.mark.parametrize("at_once", [1, 2 * 12 * 16, 2**20])
def test_log_probabilities_are_the_same_however_many_steps_wait_for_theirs(at_once, monkeypatch):
    monkeypatch.setattr(kept, "AT_ONCE", at_once)
    torch.testing.assert_close(collected(transitions()).log_prob, WHOLE.log_prob, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "settings", [{"first": 2, "last": 1}, {"first": -1}, {"first": 1, "last": 1}, {"end": False}, {"start": "Prompt"}]
)
def test_parts_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="expected"):
        RolloutSpec(**settings)
