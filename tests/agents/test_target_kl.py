"""What is left of a rollout's optimiser steps is left out where the policy has moved too far."""

import pytest
import torch
from chains import class_walks, mlp

from rlfusion.agents import AGENTS
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.schedule import Cosine

TIMES = TimeGrid(4).times(Cosine())
BOTH = pytest.mark.parametrize("name", ["ddpo", "grpo"])


def learned(name: str, **settings):
    """The weights after a rollout's update, its metrics, and the mean KL at each of its steps, by its definition."""
    config, policy = AGENTS[name](**{"lr": 3e-3, "epochs": 3, "updates_per_epoch": 2} | settings), mlp()
    learner = config.learner(type("Task", (), {"policy": policy, "times": TIMES}), None, 0)
    seen, accumulate = [], learner.transitions.accumulate

    def noting(*of, **more):
        records = accumulate(*of, **more)
        r = torch.cat([record["log_ratio"] for record in records]).double().exp()
        seen.append((r - 1 - r.log()).mean().item())
        return records

    learner.transitions.accumulate = noting
    metrics = learner.update(class_walks(policy, n=40))
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), metrics, seen


@BOTH
def test_the_step_that_finds_too_large_a_kl_is_the_last(name):
    whole, metrics, seen = learned(name)
    assert len(seen) == 6
    assert "updates_made" not in metrics
    for last in range(1, 6):
        if seen[last] <= max(seen[:last]):
            continue
        limit = (seen[last] + max(seen[:last])) / 2
        weights, found, made = learned(name, target_kl=limit)
        assert found["updates_made"] == len(made) == last + 1
        assert made == seen[: last + 1]
        assert torch.equal(weights, whole) == (last == 5)


@BOTH
def test_a_pass_that_is_left_out_leaves_the_bits_of_the_one_before(name):
    """The first step is on-policy, so the second is the first that can be beyond any limit."""
    one, _, _ = learned(name, epochs=1)
    cut, metrics, _ = learned(name, target_kl=1e-9)
    assert metrics["updates_made"] == 2
    assert torch.equal(one, cut)


@BOTH
def test_a_limit_that_is_never_reached_changes_nothing(name):
    (free, _, _), (held, metrics, _) = learned(name), learned(name, target_kl=1e6)
    assert torch.equal(free, held)
    assert metrics["updates_made"] == 6


@BOTH
@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_limit_is_refused(name, limit):
    with pytest.raises(ConfigError, match=r"target_kl = .*: expected a number of nats > 0"):
        AGENTS[name](target_kl=limit)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddpo", {"form": "sf"}),
        ("ddpo", {"fused": True}),
        ("grpo", {"fused": True, "epochs": 1, "updates_per_epoch": 1}),
    ],
)
def test_where_there_is_one_step_it_is_refused(name, settings):
    with pytest.raises(ConfigError, match=r"target_kl = 0\.1"):
        AGENTS[name](target_kl=0.1, **settings)
