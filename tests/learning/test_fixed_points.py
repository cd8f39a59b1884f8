"""Where training with a KL to the base model ends: the tilted density p exp(R / lambda) / Z (KL-regularised control).

The optimum over all walks has p_base exp(R / lambda) / Z at its end. Gaussian steps, eight of them, come near it and
not quite to it, and the last step, to clean data, has no density and pays no KL: hence the tolerances, a fraction of
what separates one lambda from the next (.75 and .90 of the samples in the rewarded mode; without KL all).
"""

import math
from dataclasses import replace

import pytest
import torch
from plane import STEPS, ends, plane_data, plane_task
from torch import Tensor

from rlfusion.agents.ddpo import Config
from rlfusion.rollout import plan, run_item

WALKS, COUNT = 512, 8000


def right(x: Tensor, cond: object = None) -> Tensor:
    """A linear reward: the first coordinate."""
    return x.flatten(1)[:, 0]


def trained(strength: float, updates: int = 80) -> Tensor:
    """(COUNT, 2) samples of the averaged weights after training with that ``kl_reward``."""
    task = replace(plane_task(), reward=right)
    config = Config(lr=1e-3, epochs=2, updates_per_epoch=2, kl_reward=strength, kl_loss=0.0, advantage="batch")
    learner = replace(config, ema_decay=0.97).learner(task, plane_data(), 1)
    for i in range(updates):
        item = plan(1, i, 1, WALKS, WALKS, 1, i)[0]
        learner.update(run_item(replace(task, rollout_spec=config.rollout_spec(STEPS)), item))
    with learner.optimization.ema.averaged():
        return ends(task, COUNT)


def summary(x: Tensor, weight: Tensor) -> tuple[float, float]:
    """(share of the samples on the right, mean of the first coordinate) under weights (N,)."""
    weight = weight.double() / weight.double().sum()
    return weight[x[:, 0] > 0].sum().item(), (weight * x[:, 0]).sum().item()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_kl_in_the_reward_leads_to_the_tilted_density(strength):
    base = ends(plane_task(), COUNT)
    share, mean = summary(base, (right(base) / strength).exp())
    assert share == pytest.approx(1 / (1 + math.exp(-1.2 / strength)), abs=0.03)
    found = trained(strength)
    assert summary(found, torch.ones(COUNT)) == (pytest.approx(share, abs=0.05), pytest.approx(mean, abs=0.06))


def test_without_it_all_samples_move():
    assert (trained(0.0, updates=25)[:, 0] > 0).double().mean().item() > 0.98
