"""The learning rate that follows the policy: its unit, its rule, and fresh optimisers on pipelines."""

import math
from contextlib import nullcontext

import pytest
import torch
from chains import Capture, class_walks, mlp

from rlfusion.agents import ddpo, grpo, ppo
from rlfusion.common.errors import ConfigError, StateError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.rl.agent import Plan
from rlfusion.rl.pace import START, Pace, shift_of
from rlfusion.rl.transitions import Transitions, step_weights


@pytest.mark.parametrize("features", [64, 1024, 65536])
@pytest.mark.parametrize("shift", [0.01, 0.1, 0.5])
def test_the_shift_is_read_from_the_ratios_at_any_size(features, shift):
    """The ratios of Gaussians whose means differ by ``shift`` in every dimension."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4000, generator=g, dtype=torch.float64) * math.sqrt(features)  # the sum of z over the dimensions
    log_ratio = shift * z - features * shift**2 / 2
    assert 0.55 * shift < shift_of(log_ratio, features) < 1.05 * shift


def test_the_shift_by_hand():
    log_ratio = torch.tensor([-4.0, 1.0, 1000.0])  # m = 4: sqrt(9) - 1 = 2
    assert shift_of(log_ratio, 4) == pytest.approx(1.0)
    assert shift_of(torch.zeros(0), 4) == 0.0


def ratios(shift: float, features: int = 64) -> list[dict[str, torch.Tensor]]:
    m = math.sqrt(features) * shift + features * shift**2 / 2
    return [{"log_ratio": torch.tensor([m, -m])}, {"log_ratio": torch.tensor([m])}]


def test_the_share_follows_what_is_due():
    pace = Pace(0.1)
    assert pace.heed(ratios(9.0), 0, 4, 64) == START  # the first step of a rollout says nothing
    assert pace.heed(ratios(0.001), 1, 4, 64) == 2 * START
    assert pace.heed(ratios(0.03), 1, 4, 64) == 2 * START  # .025 is due
    assert pace.heed(ratios(0.03), 3, 4, 64) == 4 * START  # .075 is due
    assert pace.heed(ratios(0.2), 3, 4, 64) == 2 * START
    for _ in range(20):
        pace.heed(ratios(0.0), 3, 4, 64)
    assert pace.share == 1.0
    assert pace.told() == {"lr_share": 1.0, "shift": 0.0}


def test_without_a_target_nothing_is_looked_at():
    pace = Pace(None)
    assert (pace.heed([], 3, 4, 64), pace.told(), pace.kept()) == (1.0, {}, {})


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("agent", [ddpo, grpo])
def test_a_pace_that_is_none_is_refused(agent, value):
    with pytest.raises(ConfigError, match=r"pace = .*expected a number > 0"):
        agent.Config(pace=value)


def test_a_saved_share_is_checked():
    pace = Pace(0.1)
    with pytest.raises(StateError, match=r"share.*is 2"):
        pace.load_state_dict({"share": 2.0})
    pace.load_state_dict({"share": 0.25})
    assert pace.share == 0.25


def settings(agent, **changes):
    plain = {"lr": 1e-3, "epochs": 1, "updates_per_epoch": 4, "kl_loss": 0.0, "micro_batch": 10**6}
    return agent.Config(**plain | changes)


@pytest.mark.parametrize("agent", [ddpo, grpo])
def test_a_fresh_optimiser_begins_with_a_share_of_its_step_and_goes_on_from_the_saved_one(agent):
    batch = class_walks(mlp())
    first = {}
    for pace in (None, 0.1):
        policy = mlp()
        times = TimeGrid(batch.x.shape[1] - 1).times(policy.schedule)
        before = [p.detach().clone() for p in policy.parameters()]
        learner = agent.Learner(policy, times, settings(agent, updates_per_epoch=1, pace=pace))
        learner.update(batch)
        first[pace] = [(p.detach() - q) for p, q in zip(policy.parameters(), before)]
    for whole, part in zip(first[None], first[0.1]):
        torch.testing.assert_close(part, START * whole, atol=1e-8, rtol=1e-3)

    learner.pace.share = 0.5
    other = agent.Learner(mlp(), times, settings(agent, updates_per_epoch=1, pace=0.1))
    other.load_state_dict(learner.state_dict())
    assert other.pace.share == 0.5
    assert "pace" not in agent.Learner(mlp(), times, settings(agent)).state_dict()


def test_weights_of_the_steps_by_hand():
    policy = mlp()
    times = TimeGrid(6).times(policy.schedule)
    stds, weight = policy.stds(times), step_weights(policy, times, "noise")
    noisy = stds > 0
    assert weight[noisy].mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(weight[noisy] / weight[0], (stds[noisy] / stds[0]).float())
    assert step_weights(policy, times, "none") is None


def test_the_loss_of_each_step_has_its_weight():
    """The gradient of all steps is the weighted sum of those of each."""
    policy = mlp().double()
    batch = class_walks(policy)
    times = TimeGrid(batch.x.shape[1] - 1).times(policy.schedule)
    walks = torch.arange(len(batch))

    def gradient(weighing: str, steps: torch.Tensor) -> torch.Tensor:
        transitions = Transitions(policy, times, 10**6, False, weighing)
        capture = Capture(policy)
        walk, step = walks.repeat_interleave(len(steps)), steps.repeat(len(walks))
        transitions.accumulate(batch, walk, step, lambda terms: -terms.log_prob * batch.reward[terms.walk], summed=1)
        capture.step()
        return capture.gradients[0] * len(steps)

    steps = Transitions(policy, times, 1, False).steps
    weight = step_weights(policy, times, "noise").double()
    expected = sum(weight[k] * gradient("none", steps[i : i + 1]) for i, k in enumerate(steps))
    torch.testing.assert_close(gradient("noise", steps), expected)
    assert not torch.allclose(gradient("none", steps), expected)


@pytest.mark.parametrize("agent", [ddpo, grpo, ppo])
@pytest.mark.parametrize(("epochs", "updates", "fits"), [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_a_pace_that_would_never_look_at_a_ratio_is_refused(agent, epochs, updates, fits):
    made = agent.Config(epochs=epochs, updates_per_epoch=updates, pace=0.1)
    with nullcontext() if fits else pytest.raises(ConfigError, match=r"one update a rollout: .* pace null"):
        made.check(Plan(2, 8, 0, 5))
