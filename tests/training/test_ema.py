"""Averaged weights: the power rule against its closed form, the constant one as it was, and their text."""

import numpy as np
import pytest
import torch
from counted import counting

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, StateError
from rlfusion.training.optimization import EMA, EMA_RULES, Constant, Optimization, Power, exponent


def weights(rule, updates: int) -> torch.Tensor:
    """What each of 0..``updates`` sets of parameters weighs in the average: the i-th set is the i-th unit vector."""
    module = torch.nn.Linear(updates + 1, 1, bias=False, dtype=torch.float64)
    unit = torch.eye(updates + 1, dtype=torch.float64)
    module.weight.data.copy_(unit[:1])
    ema = EMA(module, rule)
    for n in range(1, updates + 1):
        module.weight.data.copy_(unit[n : n + 1])
        ema.update()
    return ema.shadow["weight"][0]


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 16.97])
def test_the_power_rule_weighs_by_a_power_of_time(gamma):
    held = weights(Power(gamma=gamma), 30)
    edges = (torch.arange(31, dtype=torch.float64) / 30) ** (gamma + 1)
    assert held[0] == 0
    torch.testing.assert_close(held[1:], edges.diff(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_sigma_rel_is_the_spread_of_the_weights_over_time(sigma_rel):
    held, n = weights(Power(sigma_rel=sigma_rel), 400)[1:], 400
    time = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    mean = (held * time).sum()
    spread = (held * (time - mean) ** 2).sum().sqrt().item()
    assert spread == pytest.approx(sigma_rel, rel=2e-3)


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, 12**-0.5])
def test_the_exponent_solves_its_cubic(sigma_rel):
    gamma = exponent(sigma_rel)
    roots = np.roots([sigma_rel**2, 7 * sigma_rel**2, 16 * sigma_rel**2 - 1, 12 * sigma_rel**2 - 1])
    assert gamma == pytest.approx(max(roots.real), rel=1e-9, abs=1e-9)
    assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma_rel, rel=1e-12)


def test_the_published_pairs():
    """The paper's gamma for sigma_rel = 0.05 and 0.1."""
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent(0.1) == pytest.approx(6.94, abs=5e-3)


def test_the_constant_rule_is_warmed_up_and_a_number_means_it():
    assert [Constant(0.3)(n) for n in range(4)] == [min(0.3, (1 + n) / (10 + n)) for n in range(4)]
    assert Constant(0.999)(10**6) == 0.999
    assert Constant(0.0)(5) == 0.0
    assert torch.equal(weights(0.3, 12), weights(Constant(0.3), 12))


def test_a_resumed_average_is_the_uninterrupted_one():
    def optimization():
        torch.manual_seed(0)
        return Optimization(torch.nn.Linear(3, 2), lr=0.1, ema=Power(sigma_rel=0.2))

    def step(o, n):
        o.module(torch.full((1, 3), float(n))).square().sum().backward()
        o.step()

    straight, stopped, resumed = optimization(), optimization(), optimization()
    for n in range(6):
        step(straight, n)
    for n in range(3):
        step(stopped, n)
    resumed.load_state_dict(stopped.state_dict())
    for n in range(3, 6):
        step(resumed, n)
    assert not torch.equal(straight.ema.shadow["weight"], straight.module.weight)
    assert torch.equal(straight.ema.shadow["weight"], resumed.ema.shadow["weight"])


@pytest.mark.parametrize("rule", [Constant(), Constant(0.5), Power(sigma_rel=0.1), Power(gamma=3.0)])
def test_a_rule_is_read_from_its_text(rule):
    assert spec.parse(repr(rule), EMA_RULES, "average") == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Constant(decay=1)", "decay = 1"),
        ("Constant(decay=-0.1)", "decay = -0.1"),
        ("Constant(dekay=0.1)", "did you mean 'decay'"),
        ("Power()", "one of the two"),
        ("Power(sigma_rel=0.1, gamma=3)", "one of the two"),
        ("Power(sigma_rel=0.3)", "sigma_rel = 0.3"),
        ("Power(sigma_rel=0)", "sigma_rel = 0"),
        ("Power(gamma=-0.5)", "gamma = -0.5"),
        ("Power(gamma=1e999)", "gamma = inf"),
        ("Powr(gamma=1)", "did you mean 'Power'"),
    ],
)
def test_impossible_rules_are_refused(text, said):
    with pytest.raises(ConfigError) as caught:
        spec.parse(text, EMA_RULES, "average")
    assert said in str(caught.value)


def test_a_number_that_is_no_decay_is_refused_by_its_setting():
    with pytest.raises(ConfigError, match=r"ema_decay = 1.0"):
        EMA(torch.nn.Linear(1, 1), 1.0)


def test_an_average_takes_one_call_however_many_parameters_there_are():
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 3) for _ in range(5)))
    average, expected = EMA(module, 0.5), [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        torch.nn.init.normal_(p)
    with counting() as ops:
        average.update()
    for held, p in zip(expected, module.parameters()):
        held.lerp_(p.detach(), 1 - Constant(0.5)(0))
    assert all(torch.equal(a, b) for a, b in zip(average.shadow.values(), expected, strict=True))
    assert ops == {"aten._foreach_lerp_": 1}


def test_without_a_decay_the_parameters_are_their_average_and_nothing_is_kept():
    module = torch.nn.Linear(3, 2)
    average = EMA(module, 0.0)
    with counting() as ops:
        average.update()
    assert not ops
    torch.nn.init.normal_(module.weight)
    before = module.weight.detach().clone()
    assert torch.equal(average.shadow["weight"], before)
    with average.averaged():
        assert torch.equal(module.weight, before)
    average.settle()
    assert torch.equal(module.weight, before)
    assert average.state_dict() == {"count": 1, "shadow": {}}


def test_an_average_begins_at_the_parameters_where_there_was_none():
    module = torch.nn.Linear(3, 2)
    none, some = EMA(module, 0.0), EMA(module, 0.5)
    some.update()
    torch.nn.init.normal_(module.weight)
    some.load_state_dict(none.state_dict())
    assert some.count == 0
    assert torch.equal(some.shadow["weight"], module.weight)
    some.shadow["weight"].zero_()
    none.load_state_dict(some.state_dict())  # a file of before has an average that nobody reads
    assert torch.equal(none.shadow["weight"], module.weight)
    assert module.weight.count_nonzero()
    with pytest.raises(StateError, match="the averages' shadow has no 'bias'"):
        none.load_state_dict({"count": 0, "shadow": {"weight": module.weight.detach()}})


def test_a_module_without_trained_parameters_has_an_average():
    EMA(torch.nn.Linear(1, 1).requires_grad_(False), 0.5).update()
