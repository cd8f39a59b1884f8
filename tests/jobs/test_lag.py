"""Rollouts ahead of the learner: which weights act, what the histogram shows, and a lag that shortens by itself."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from rollout_tasks import make_recipe
from tiny_runs import TINY
from tiny_training import trained

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.common.weights import Weights
from rlfusion.config import Rollout
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.parts import Collecting
from rlfusion.rl.guard import Config, Guarded
from rlfusion.rollout import Local, version_for
from rlfusion.rollout.item import lag_at


def weights(version: int) -> Weights:
    return Weights(version, str(version), b"")


class Asked:
    """A backend that notes which step was asked for under which version, once."""

    def __init__(self) -> None:
        self.asked: dict[int, int] = {}

    def submit(self, items, weights):
        assert items[0].iteration not in self.asked
        self.asked[items[0].iteration] = weights.version
        return list


def collector(lag: int, every: int, updates: int, start: int = 0) -> Collector:
    spec = Collecting(0, Rollout(prompts=1, samples_per_prompt=2, lag=lag), updates, every)
    return Collector(Asked(), spec, None, 1, start, torch.device("cpu"))


def ran(lag: int, every: int, updates: int, slow_after: set[int]) -> Collector:
    """A run whose walks count too little after these updates."""
    held = collector(lag, every, updates)
    held.publish(weights(0))
    for done in range(1, updates + 1):
        held.heed(done, {"behaviour_ess": 0.2 if done in slow_after else 0.9}, Config())
        held.publish(weights(done))
    return held


@pytest.mark.parametrize(("lag", "every"), itertools.product([0, 1, 2, 4], [1, 3, 8, 100]))
def test_every_step_is_collected_once_under_weights_of_at_most_the_lag_of_the_moment(lag, every):
    draw = random.Random(lag)
    for _ in range(10):
        slow = {n for n in range(30) if draw.random() < 0.15}
        held = ran(lag, every, 24, slow)
        assert held.backend.asked == {step: held.version(step) for step in range(24)}
        for step in range(24):
            version = held.version(step)
            assert step // every * every <= version <= step
            assert step - version <= lag_at(version, lag, held.slowed) <= lag
        assert len(held.slowed) == min(lag, len([n for n in slow if 0 < n <= 24]))


def test_without_reductions_it_is_the_rule_of_a_fixed_lag():
    for lag, every, step in itertools.product(range(5), [0, 1, 3, 8], range(30)):
        assert version_for(step, lag, every, [100]) == version_for(step, lag, every)
        assert version_for(step, lag, every) == max(step // every * every if every else 0, step - lag)
    assert [version_for(s, 2, 0, [3]) for s in range(8)] == [0, 0, 0, 1, 2, 4, 5, 6]
    assert [version_for(s, 2, 0, [3, 4]) for s in range(8)] == [0, 0, 0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize("stopped", range(1, 12))
def test_a_run_that_stops_anywhere_goes_on_with_the_same_versions(stopped):
    whole = ran(3, 5, 16, {2, 6, 9})
    half = collector(3, 5, 16)
    half.publish(weights(0))
    for done in range(1, stopped + 1):
        half.heed(done, {"behaviour_ess": 0.2 if done in {2, 6, 9} else 0.9}, Config())
        half.publish(weights(done))
    rest = collector(3, 5, 16, start=stopped)
    rest.slowed = list(half.slowed)
    for version in sorted(half.still_needed(stopped)):
        rest.publish(weights(version))
    for done in range(stopped, 17):
        if done > stopped:
            rest.heed(done, {"behaviour_ess": 0.2 if done in {2, 6, 9} else 0.9}, Config())
        rest.publish(weights(done))
    assert rest.backend.asked == {step: version for step, version in whole.backend.asked.items() if step >= stopped}


def test_it_warns_then_slows_down_and_says_so():
    held, limits = collector(2, 100, 9), Config(ess_warn=0.5, ess_slow=0.25)
    assert held.heed(1, {}, limits) == held.heed(1, {"behaviour_ess": 0.5}, limits) == ""
    assert held.heed(1, {"behaviour_ess": 0.4}, limits) == (
        "warning: update 1: 0.4 of the walks of older weights count, below guard.ess_warn = 0.5"
    )
    slower = [held.heed(n, {"behaviour_ess": 0.2}, limits) for n in (2, 3)]
    assert [line.rpartition(": ")[2] for line in slower] == ["the lag is 1 from here on", "the lag is 0 from here on"]
    assert held.heed(4, {"behaviour_ess": 0.2}, limits).endswith("below guard.ess_warn = 0.5")
    assert held.slowed == [2, 3]


def test_then_it_stops_with_the_weights_from_before():
    class Learner:
        policy, seed, iteration, queries, held = torch.nn.Linear(1, 1), 0, 4, 0, 1

        def update(self, batch):
            self.held = 2
            return {"reward": 0.0, "grad_norm": 1.0, "behaviour_ess": 0.04}

        def state_dict(self):
            return {"held": self.held}

        def load_state_dict(self, state):
            self.held = state["held"]

    class Batch(list):
        reward = None

    guarded = Guarded(Learner(), Config(), None)
    with pytest.raises(NumericalError, match=r"rollout 5: 0.04 of the walks of older weights count, below 0.05.*ends"):
        guarded.update(Batch())
    assert guarded.learner.held == 1


@pytest.mark.parametrize("wrong", [{"ess_stop": 0.3}, {"ess_slow": 0.6}, {"ess_warn": 1.1}, {"ess_stop": -0.1}])
def test_limits_out_of_order_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"0 <= ess_stop <= ess_slow <= ess_warn <= 1"):
        Config(**wrong)


class Shuffled(Local):
    """Asks for the walks of later rollouts first, as workers may be done with them in any order."""

    def __init__(self, task, seed: int) -> None:
        super().__init__(task)
        self.draw, self.waiting = random.Random(seed), []

    def submit(self, items, weights):
        held: list = []
        inner = super().submit(items, weights)
        self.waiting.append(lambda: held or held.extend(inner()))

        def wait():
            self.draw.shuffle(self.waiting)
            for one in self.waiting:
                one()
            return held

        return wait


def test_each_lag_is_deterministic_and_a_run_of_its_own_whatever_is_done_first():
    task = make_recipe().build()
    found = {lag: trained(Local(task), lag=lag, updates=7).digest for lag in (0, 1, 2, 4)}
    assert len(set(found.values())) == 4
    for lag, digest in found.items():
        assert trained(Shuffled(task, lag), lag=lag, updates=7).digest == digest


RUN = ("finetune", *TINY, "--reward", "ink", "--checkpoint_every", "100", "--monitor.every", "0")
RUN += ("--evaluation.deterministic", "false", "--evaluation.samples", "50", "--rollout.lag", "2")
SLOW = ("--guard.ess_warn", "1", "--guard.ess_slow", "1")


def weights_of(run: Path) -> bytes:
    return (run / "model" / "weights.safetensors").read_bytes()


def test_a_shortened_lag_is_remembered_and_the_lags_are_seen(tiny_root, capsys):
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    begin = (*map(str, RUN), "--root", str(tiny_root), *SLOW, "--updates")
    assert main([*begin, "6", "--name", "lag-whole"]) == 0
    said = capsys.readouterr().err
    assert "update 2: " in said
    assert "the lag is 1 from here on" in said
    assert "the lag is 0 from here on" in said
    assert main([*begin, "3", "--name", "lag-cut"]) == 0
    assert main(["finetune", "--resume", str(tiny_root / "lag-cut"), "--change", "updates=6"]) == 0
    assert weights_of(tiny_root / "lag-cut") == weights_of(tiny_root / "lag-whole")
    events = EventAccumulator(str(tiny_root / "lag-whole"), {HISTOGRAMS: 0}).Reload()
    last = events.Histograms("train/lags")[-1].histogram_value
    lags = [round(e.value) for e in (events.Reload().Scalars("train/lag"))]
    assert lags[:3] == [0, 1, 2]
    assert lags[-1] == 0
    assert dict(zip((round(x - 0.5) for x in last.bucket_limit), map(int, last.bucket))) == Counter(lags)
