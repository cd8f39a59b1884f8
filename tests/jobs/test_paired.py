"""Rewards of single samples: kept with an evaluation, and what two runs differ by, prompt by prompt."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rlfusion.common.errors import ConfigError
from rlfusion.jobs.compare.baselines import BASE
from rlfusion.jobs.compare.paired import cells, differences, of_baselines, of_run
from rlfusion.jobs.sample_rewards import keep, kept

LABEL = torch.arange(12) % 3


def test_the_base_and_the_newest_evaluation_are_kept(tmp_path):
    rewards = [torch.rand(12) for _ in range(3)]
    for step, reward in zip((0, 4, 8), rewards):
        keep(tmp_path, step, LABEL, reward)
    assert kept(tmp_path, 4) is None
    for step, reward in ((0, rewards[0]), (8, rewards[2])):
        found = kept(tmp_path, step)
        assert np.array_equal(found, np.stack([LABEL.numpy(), reward.double().numpy()]))
    keep(tmp_path, 4, LABEL, rewards[1])  # as a run that resumes from before has it
    assert (kept(tmp_path, 8), kept(tmp_path, 0) is None) == (None, False)
    (tmp_path / "evaluations" / "rewards-4.npy").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"rewards-4\.npy' is damaged"):
        kept(tmp_path, 4)
    np.save(tmp_path / "evaluations" / "rewards-4.npy", np.zeros(3))
    with pytest.raises(ConfigError, match=r"float64\(3,\), expected float64 \(2, N\)"):
        kept(tmp_path, 4)


def test_cells_by_hand():
    base = np.array([[0, 0, 1, 1], [1.0, 3.0, 1.0, 3.0]])  # mean 2, sd 1
    last = np.array([[0, 0, 1, 1], [4.0, 6.0, 2.0, math.nan]])
    assert cells(5, last, base) == {(5, 0): 3.0, (5, 1): 0.0}


def test_differences_are_of_the_same_samples():
    draw = np.random.default_rng(0)
    prompts, noise = np.arange(200) % 10, draw.normal(size=(2, 200)) * 5  # hard and easy samples, the same for both
    base = {seed: np.stack([prompts, noise[seed]]) for seed in (0, 1)}
    agents = {}
    for name, rise in (("a", 1.0), ("b", 0.5)):
        agents[name] = {}
        for seed in (0, 1):
            jitter = draw.normal(size=200) * 0.1
            agents[name] |= cells(
                seed, np.stack([prompts, noise[seed] + rise * base[seed][1].std() + jitter]), base[seed]
            )
    baselines = of_baselines({BASE: base[0], "best of 2": np.stack([prompts, noise[0] + 2 * noise[0].std()])})
    (table,) = differences("ink", agents, baselines)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["a - b"][0] == "+0.50"
    assert rows["a - b"][3] == "20"
    assert float(rows["a - b"][2]) < 0.01, "means over the noise would hide it"
    apart = [agents["a"][cell] - agents["b"][cell] for cell in agents["a"]]
    known = stats.permutation_test((apart,), np.mean, permutation_type="samples", n_resamples=2**14, rng=0)
    assert float(rows["a - b"][2]) == pytest.approx(known.pvalue, abs=0.01)
    assert rows["a - best of 2"][0] == "-1.00"
    assert rows["a - best of 2"][3] == "10", "the baselines are of seed 0"
    assert not list(differences("ink", {"a": {}, "b": {}}, {}))


def test_runs_without_kept_rewards_have_no_cells(tmp_path):
    from rlfusion.jobs.curves import Point

    points = [Point(n, n, 1.0, 1.0, 0.0, 1.0, None, None, 1.0, {}) for n in (0, 4)]
    assert of_run(tmp_path, 0, points) == {}
    for step in (0, 4):
        keep(tmp_path, step, LABEL, torch.arange(12.0) + step)
    found = of_run(tmp_path, 7, points)
    assert set(found) == {(7, 0), (7, 1), (7, 2)}
    assert found[7, 1] == pytest.approx((5.5 + 4 - 5.5) / np.arange(12).std())
