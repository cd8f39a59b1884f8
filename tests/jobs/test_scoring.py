"""Several rewards, each normalised before its weight; failed rewards left out, never counted as 0."""

import json

import pytest
import torch
from processes import rlfusion
from tiny_runs import TINY

from rlfusion.common.errors import ConfigError
from rlfusion.config import Finetune
from rlfusion.jobs.parts import opened
from rlfusion.jobs.scoring import scored
from rlfusion.rewards import RewardError, score
from rlfusion.rl.advantage import group_relative, normalized_sum
from rlfusion.rollout.trajectory import Trajectory

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
TERMS = torch.tensor([[0.0, 30.0], [1.0, 10.0], [2.0, 20.0], [5.0, -100.0], [5.0, 100.0], [8.0, 0.0]])
BOTH = {"ink": 1.0, "symmetry": 0.5}


def batch(reward=None, terms=TERMS) -> Trajectory:
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    reward = terms @ torch.tensor([1.0, 0.5]) if reward is None else reward
    x = torch.arange(6.0).reshape(6, 1, 1)
    return Trajectory(x, times, None, reward, GROUP, {"label": GROUP}, 3, torch.ones(6, dtype=torch.int64), terms)


def test_terms_are_normalised_in_their_group_before_the_weights():
    total, share = normalized_sum(TERMS, torch.tensor([1.0, 0.5]), GROUP)
    parts = [group_relative(TERMS[:, 0], GROUP), 0.5 * group_relative(TERMS[:, 1], GROUP)]
    torch.testing.assert_close(total, parts[0] + parts[1])
    torch.testing.assert_close(share, torch.stack([p.abs().mean() for p in parts]) / sum(p.abs().mean() for p in parts))
    scaled = TERMS * torch.tensor([1.0, 1e4]) + torch.tensor([7.0, -9.0])
    torch.testing.assert_close(normalized_sum(scaled, torch.tensor([1.0, 0.5]), GROUP)[0], total, rtol=1e-3, atol=1e-3)


def test_a_reward_that_never_differs_has_no_share():
    terms = TERMS.clone()
    terms[:, 1] = 4.0
    total, share = normalized_sum(terms, torch.tensor([1.0, 0.5]), GROUP)
    assert share.tolist() == [1.0, 0.0]
    torch.testing.assert_close(total, group_relative(TERMS[:, 0], GROUP))


@pytest.mark.parametrize("how", ["group", "batch"])
def test_the_learner_gets_the_normalised_sum_and_the_log_the_plain_one(how):
    got, log = scored(batch(), opened(Finetune(reward=BOTH, reward_normalize=how)).rewards)
    group = GROUP if how == "group" else torch.zeros_like(GROUP)
    torch.testing.assert_close(got.reward, normalized_sum(TERMS, torch.tensor([1.0, 0.5]), group)[0])
    assert log["reward"] == pytest.approx((TERMS @ torch.tensor([1.0, 0.5])).mean().item())
    assert log["reward_ink"] == pytest.approx(3.5)
    assert log["reward_symmetry"] == pytest.approx(10.0)
    assert log["share_ink"] + log["share_symmetry"] == pytest.approx(1)


def test_without_normalisation_nothing_changes_but_the_log():
    got, log = scored(batch(), opened(Finetune(reward=BOTH)).rewards)
    assert torch.equal(got.reward, batch().reward)
    assert set(log) == {"reward_ink", "reward_symmetry"}


def test_failed_rewards_are_left_out_with_all_of_their_walks():
    terms = TERMS.clone()
    terms[4, 1] = torch.nan
    got, log = scored(batch(terms=terms), opened(Finetune(reward=BOTH, reward_failures="mask", max_failed=0.2)).rewards)
    assert got.x.flatten().tolist() == [0, 1, 2, 3, 5]
    assert [len(part) for part in (got.reward, got.group, got.terms, got.begin, got.cond["label"])] == [5] * 5
    assert log["failed"] == pytest.approx(1 / 6)
    assert got.reward.isfinite().all()
    assert (len(got), got.asked) == (5, 6)


def test_too_many_failures_are_an_error():
    reward = torch.tensor([1.0, torch.nan, torch.nan, 1.0, 2.0, 3.0])
    with pytest.raises(RewardError, match=r"'ink' failed for 33% of 6 samples: expected at most max_failed = 0.1"):
        scored(batch(reward, None), opened(Finetune(reward="ink", reward_failures="mask")).rewards)


def test_a_reward_gets_the_layout_that_a_served_one_gets():
    """Autoencoders give several samples channels last, and one not; a sum in another order has other bits."""
    seen = []
    x = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    value = score(lambda x, c: seen.append(x.stride()) or x.mean((1, 2, 3)), x, None, "it")
    assert seen == [(192, 64, 8, 1)]
    assert value.requires_grad


def test_a_masked_score_passes_nan_and_nothing_else():
    samples = torch.zeros(3, 1, 2, 2)
    values = torch.tensor([1.0, torch.nan, 2.0])
    got = score(lambda x, c: values, samples, None, "mine", masked=True)
    assert got.isnan().tolist() == [False, True, False]
    with pytest.raises(RewardError, match="item 1 = nan"):
        score(lambda x, c: values, samples, None, "mine")
    with pytest.raises(RewardError, match="item 2 = inf"):
        score(lambda x, c: torch.tensor([1.0, torch.nan, torch.inf]), samples, None, "mine", masked=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": "ink", "reward_normalize": "group"}, "there is one reward"),
        ({"max_failed": 1.0}, "max_failed = 1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Finetune(**settings)


REWARDS = """
import torch

def flaky(samples, cond):
    value = samples.flatten(1).mean(1)
    return value.where(value < value.quantile(0.95), torch.nan)
"""


@pytest.fixture
def root(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path


def trained(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/reward" in line]


WORKER = ("--rollout.workers", 1, "--precision", "bfloat16", "--agent.clip", 0.9)


@pytest.mark.parametrize("how", [(), pytest.param(WORKER, marks=pytest.mark.alone)], ids=["", "a worker, bfloat16"])
def test_two_normalised_rewards_through_the_command(root, how):
    more = ("--reward", '{"ink": 1.0, "symmetry": 0.5}', "--reward_normalize", "group", *how)
    said = rlfusion(root, "finetune", *TINY, *more, "--name", "it")
    assert said.code == 0, said.err
    line = trained(root / "runs" / "it")[-1]
    assert line["train/share_ink"] + line["train/share_symmetry"] == pytest.approx(1)
    assert line["train/reward"] == pytest.approx(
        line["train/reward_ink"] + 0.5 * line["train/reward_symmetry"], rel=1e-4
    )


def test_a_flaky_reward_is_refused_unless_masked(root):
    plain = rlfusion(root, "finetune", *TINY, "--reward", "mine:flaky", "--name", "no")
    assert plain.code in (2, 4)
    assert "flaky" in plain.err


def test_a_reward_that_fails_for_some_is_masked_in_training(root):
    """Rollouts score parts of 10, 10 and 4 samples; this one fails once in each part of 10, and nowhere else."""
    (root / "mine.py").write_text(
        """
import torch

def flaky(samples, cond):
    value = samples.flatten(1).mean(1)
    return value.where((value < value.max()) | torch.tensor(len(value) != 10), torch.nan)
"""
    )
    more = ("--reward", "mine:flaky", "--reward_failures", "mask", "--max_failed", 0.3, "--name", "it")
    said = rlfusion(root, "finetune", *TINY, *more)
    assert said.code == 0, said.err
    assert [line["train/failed"] for line in trained(root / "runs" / "it")] == pytest.approx([2 / 24] * 6)
    assert [line["train/queries"] for line in trained(root / "runs" / "it")] == [24 * n for n in range(1, 7)]
