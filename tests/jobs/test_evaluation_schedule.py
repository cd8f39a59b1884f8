"""When a run is evaluated on its way, by default: a tenth of its walks at most, and no other bits of its training."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import TINY

from rlfusion.cli.main import main
from rlfusion.config import Finetune
from rlfusion.config.parts import Evaluations, Rollout
from rlfusion.jobs.curves import curve
from rlfusion.jobs.finetune.schedule import MOST, Schedule, schedule
from rlfusion.rl.monitor import Config as Monitoring


def steps(told: Schedule, updates: int) -> list[int]:
    return [done for done in range(1, updates + 1) if told.due(done, updates)]


@pytest.mark.parametrize("every", [0, 1, 4, 7])
@pytest.mark.parametrize(("budget", "prompts"), [(0, 1), (0, 10), (0, 400), (3000, 10), (50_000, 10)])
def test_the_evaluations_on_the_way_are_a_tenth_of_the_walks_at_most(every, budget, prompts):
    for updates, walks in product((1, 5, 24, 10_007), ((4, 6), (10, 24))):
        rollout, monitor = Rollout(prompts=walks[0], samples_per_prompt=walks[1]), Monitoring(every=every)
        config = Finetune(updates=updates, rollout=rollout, monitor=monitor, budget_queries=budget)
        told = schedule(config, prompts)
        done, asked = steps(told, updates), updates * walks[0] * walks[1]
        assert len(done) * told.samples * 10 <= min(asked, budget or asked)
        assert len(done) <= MOST
        assert not told.deterministic
        assert all(step < updates and step % (every or 1) == 0 for step in done)
        if done:
            assert max(50, min(2 * prompts, 1000)) <= told.samples <= config.evaluation.samples


def test_the_defaults_have_five_and_a_long_run_has_whole_ones():
    assert schedule(Finetune(), 10) == Schedule(4, 115)
    assert schedule(Finetune(updates=10_000), 10).samples == 1000
    assert schedule(Finetune(updates=8), 10) == Schedule(4, 192)
    assert schedule(Finetune(updates=4), 10) == Schedule(0, 0)


def test_a_number_is_taken_at_its_word():
    assert schedule(Finetune(evaluation=Evaluations(every=3)), 10) == Schedule(3, 1000, True)
    assert steps(schedule(Finetune(evaluation=Evaluations(every=0)), 10), 24) == []


LONGER = (*TINY, "--rollout.prompts", 10, "--rollout.samples_per_prompt", 14, "--updates", 4, "--monitor.every", 2)
LONGER += ("--evaluation.samples", 100)


def lines(folder: Path) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        found[line["step"]] = found.get(line["step"], {}) | line
    return found


def test_a_run_is_evaluated_on_its_way_and_learns_the_same(tiny_root):
    for name, more in (("watched", ()), ("unwatched", ("--evaluation.every", 0))):
        words = ("finetune", "--root", tiny_root, "--name", name, *LONGER, *more)
        assert main([str(word) for word in words]) == 0
    ours, others = tiny_root / "watched", tiny_root / "unwatched"
    weights = "model/weights.safetensors"
    assert (ours / weights).read_bytes() == (others / weights).read_bytes()
    found, without = lines(ours), lines(others)
    assert "evaluation/gain" not in without.pop(2)
    on_the_way = found.pop(2)
    assert found == without  # of all other updates
    assert on_the_way["evaluation/count"] == 56  # a tenth of 4 x 140 walks
    assert {"monitor/kl", "evaluation/agreement", "evaluation/diversity_relative"} <= on_the_way.keys()
    assert not {"evaluation/frechet", "evaluation/recall", "evaluation_ode/reward"} & on_the_way.keys()
    base = np.load(ours / "evaluations" / "rewards-0.npy")[1]
    gain = (on_the_way["evaluation/reward"] - base[:56].mean()) / found[0]["evaluation/reward_std"]
    assert on_the_way["evaluation/gain"] == pytest.approx(gain, rel=1e-6)
    assert abs(base[:56].mean() - base.mean()) > 1e-3  # else this test could not tell the two
    points = curve(ours)
    assert [(p.updates, p.frechet is None) for p in points] == [(0, False), (2, True), (4, False)]
    assert points[1].gain == on_the_way["evaluation/gain"]
    words = ("compare", ours, others, "--out", tiny_root / "both", "--by", "evaluation.every")
    assert main([str(word) for word in words]) == 0
