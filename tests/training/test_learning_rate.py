"""The course of the learning rate by torch's schedulers: the formula, step by step, through a checkpoint and undone."""

import copy
import math

import pytest
import torch
from torch import nn

from rlfusion.training import checkpoint
from rlfusion.training.learning_rate import cosine, rise
from rlfusion.training.optimization import Optimization


def formula(peak: float, warmup: int, step: int, total: int) -> float:
    """What the rate of a step is, written down apart."""
    return peak * min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / total))


def step(o: Optimization) -> float:
    """One step; the rate that it was made with."""
    o.module(torch.ones(2, 3)).square().mean().backward()
    rate = o.optimizer.lr
    o.step()
    return rate


def fresh(factor=None, **settings) -> Optimization:
    torch.manual_seed(0)
    o = Optimization(nn.Linear(3, 2), 0.3, **settings)
    if factor is not None:
        o.follow(factor)
    return o


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 11), (20, 10)])
def test_the_rates_are_those_of_the_formula(warmup, total):
    o = fresh(cosine(total, warmup))
    rates = [step(o) for _ in range(total)]
    assert rates == pytest.approx([formula(0.3, warmup, n, total) for n in range(total)], rel=1e-14)
    assert o.optimizer.lr == pytest.approx(0, abs=1e-16)


def test_a_warm_up_rises_on_a_line_and_stays():
    o = fresh(warmup=3)
    assert [step(o) for _ in range(6)] == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3, 0.3])
    assert [rise(3)(n) for n in (0, 3, 99)] == [0.25, 1, 1]


def test_a_constant_rate_is_free_to_be_set():
    o = fresh()
    assert (step(o), o.scheduler) == (0.3, None)
    o.optimizer.lr = 0.01
    assert [step(o), step(o)] == [0.01, 0.01]


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_it_goes_on_through_a_checkpoint_and_is_undone(stop, tmp_path):
    straight, resumed = fresh(cosine(9, 2)), fresh(cosine(9, 2))
    for _ in range(stop):
        step(straight)
    checkpoint.save(tmp_path, stop, {"o": straight.state_dict()})
    before = copy.deepcopy(straight.state_dict())
    resumed.load_state_dict(checkpoint.load(checkpoint.latest(tmp_path).path)["o"])
    ahead = [step(straight) for _ in range(4)]
    assert [step(resumed) for _ in range(4)] == ahead == pytest.approx([formula(0.3, 2, stop + n, 9) for n in range(4)])
    assert torch.equal(straight.module.weight, resumed.module.weight)
    straight.load_state_dict(before)
    assert [step(straight) for _ in range(4)] == ahead
    assert torch.equal(straight.module.weight, resumed.module.weight)


def test_another_peak_of_the_settings_holds_when_a_run_goes_on():
    a, torch_seed = fresh(cosine(9, 2)), torch.manual_seed(0)
    for _ in range(3):
        step(a)
    b = Optimization(nn.Linear(3, 2), 0.6)
    b.follow(cosine(9, 2))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert b.optimizer.lr == pytest.approx(2 * a.optimizer.lr)
    assert torch_seed is not None


def test_a_step_that_is_refused_leaves_the_rate_as_it_is():
    o = fresh(cosine(9, 2))
    step(o)
    rate = o.optimizer.lr
    o.module.weight.grad = torch.full((2, 3), torch.nan)
    with pytest.raises(Exception, match="not finite"):
        o.step()
    assert o.optimizer.lr == rate
