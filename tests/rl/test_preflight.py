"""The checks before training: each fault that would fail quietly trips its own diagnosis."""

from dataclasses import replace

import pytest
import torch
from rollout_tasks import CLASSES, SHAPE, make_policy
from torch import nn

from rlfusion.agents import ddpo
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.common.weights import Weights
from rlfusion.data import to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.jobs.preflight import preflight
from rlfusion.rollout import Local, Task, plan

GRID = TimeGrid(4)


def brightness(samples, cond):
    return samples.flatten(1).mean(1)


def rolled(policy: Policy, reward=brightness):
    """A trajectory of 12 walks of ``policy``, collected as a run collects it."""
    task = Task(policy, GRID, SHAPE, torch.arange(CLASSES), to_pixels, reward, "brightness")
    (trajectory,) = Local(task).collect(plan(0, 0, 3, 4, 12, CLASSES, 0), Weights.of(policy, 0))
    return trajectory


def learner_of(policy: Policy, **settings) -> ddpo.Learner:
    return ddpo.Learner(policy, GRID.times(policy.schedule), ddpo.Config(**settings))


class DropoutNet(nn.Module):
    """A network that answers differently each time it is asked, while it is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(16, 16)

    def forward(self, x, t, cond):
        return self.linear(self.drop(x.flatten(1))).reshape(x.shape)


def test_a_sound_start_passes_and_says_what_it_saw():
    batch = rolled(make_policy())
    found = preflight(learner_of(make_policy()), batch)
    assert found["log_ratio_max"] < 1e-4
    assert found["reward"] == pytest.approx(batch.reward.mean().item())
    assert found["reward_std"] == pytest.approx(batch.reward.std(correction=0).item())


def test_dropout_in_training_mode_trips_the_ratio():
    torch.manual_seed(0)
    policy = Policy(Denoiser(DropoutNet(), Cosine(), "v"), DDIM(1.0)).train()
    with pytest.raises(NumericalError, match=r"ratio is not 1 .*dropout"):
        preflight(learner_of(policy), rolled(policy))
    assert preflight(learner_of(policy.eval()), rolled(policy))["log_ratio_max"] < 1e-4


def test_a_changed_weight_trips_the_ratio_and_is_measured():
    batch, policy = rolled(make_policy()), make_policy()
    with torch.no_grad():
        next(policy.parameters()).add_(0.05)
    with pytest.raises(NumericalError, match="ratio is not 1"):
        preflight(learner_of(policy), batch)


def test_another_guidance_or_kernel_trips_the_ratio():
    batch, policy = rolled(make_policy()), make_policy()
    with pytest.raises(NumericalError, match="ratio is not 1"):
        preflight(learner_of(Policy(policy.denoiser, DDIM(0.9))), batch)


def test_the_bound_is_a_tenth_of_the_clip_range():
    batch = rolled(make_policy())
    shifted = replace(batch, log_prob=batch.log_prob + 0.01)
    assert preflight(learner_of(make_policy(), clip=0.2), shifted)["log_ratio_max"] == pytest.approx(0.01, abs=1e-3)
    with pytest.raises(NumericalError, match="ratio is not 1"):
        preflight(learner_of(make_policy(), clip=0.05), shifted)
    per_dim = learner_of(make_policy(), clip=0.05, clip_per_dim=True)
    assert preflight(per_dim, shifted)["log_ratio_max"] == pytest.approx(0.01 / 16, abs=1e-4)


def test_a_ratio_that_is_not_a_number_trips():
    batch = rolled(make_policy())
    with pytest.raises(NumericalError, match="ratio is not 1"):
        preflight(learner_of(make_policy()), replace(batch, log_prob=batch.log_prob * torch.nan))


def test_two_walks_with_one_noise_trip():
    batch = rolled(make_policy())
    twice = batch.x.clone()
    twice[7] = twice[2]
    log_prob = batch.log_prob.clone()
    log_prob[7] = log_prob[2]
    cond = batch.cond.clone()
    cond[7] = cond[2]
    with pytest.raises(ConfigError, match="same noise"):
        preflight(learner_of(make_policy()), replace(batch, x=twice, log_prob=log_prob, cond=cond))


def test_a_flat_reward_is_reported_and_not_refused():
    """A 0/1 reward may well be equal on a few walks, at the start or at the goal."""
    batch = rolled(make_policy(), lambda samples, cond: torch.full((len(samples),), 0.25))
    assert preflight(learner_of(make_policy()), batch)["reward_std"] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_reward_that_is_not_finite_is_refused_where_it_is_scored(bad):
    def reward(samples, cond):
        return samples.flatten(1).mean(1).index_fill(0, torch.tensor([3]), bad)

    with pytest.raises(NumericalError, match="brightness"):
        rolled(make_policy(), reward)


def test_a_chain_without_noise_is_refused_when_the_learner_is_built():
    with pytest.raises(ConfigError, match="eta > 0"):
        learner_of(Policy(make_policy().denoiser, DDIM(0.0)))


def test_walks_of_a_prompt_that_begin_with_one_noise_have_to_end_apart():
    batch = rolled(make_policy())
    shared = replace(batch, x=torch.cat([batch.x[:1, :1].expand(len(batch), -1, *[-1] * 3), batch.x[:, 1:]], 1))
    alike = replace(shared, x=torch.cat([shared.x[:, :-1], shared.x[:1, -1:].expand(len(batch), -1, *[-1] * 3)], 1))
    learner = learner_of(make_policy(), clip=1e9, dual_clip=None)
    preflight(learner, shared, "prompt")
    with pytest.raises(ConfigError, match="begin with the same noise"):
        preflight(learner, shared)
    with pytest.raises(ConfigError, match="end the same: with start = prompt they have to take noise"):
        preflight(learner, alike, "prompt")
