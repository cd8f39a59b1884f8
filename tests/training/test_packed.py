"""Small parameters stepped as one: the bits of each by itself, whichever have a gradient."""

import copy

import pytest
import torch
from torch import nn

from rlfusion.training.optimizers import NamedOptimizer, packed, parse

SHAPES = [(1,), (3, 5), (17,), (64, 9), (4, 3, 3, 3), (), (129,), (80, 70)]
"""All but the last are small here."""


def parameters(dtype=torch.float32) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {f"p{i}": nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for i, shape in enumerate(SHAPES)}


def give(named: dict[str, nn.Parameter], step: int, without: tuple[str, ...] = ()) -> None:
    """Each parameter a gradient of the step."""
    draw = torch.Generator().manual_seed(100 + step)
    for name, p in named.items():
        gradient = torch.randn(p.shape, generator=draw).to(p)
        p.grad = None if name in without else gradient * 10 ** (step % 5 - 3)


def plain(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named.values(), 1e-2, weight_decay=0.1, foreach=False)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(packed, "SMALL", 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "without",
    [lambda step: (), lambda step: ("p1",), lambda step: ("p2", "p7")[: step % 3], lambda step: ("p0",)[step:]],
)
def test_the_bits_are_those_of_each_parameter_by_itself(dtype, without):
    ours, theirs = parameters(dtype), parameters(dtype)
    one, other = NamedOptimizer(parse("adamw"), ours, 1e-2, 0.1), plain(theirs)
    for step in range(6):
        give(ours, step, without(step))
        give(theirs, step, without(step))
        one.step()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(ours.values(), theirs.values()))
    for name, held in one.state_dict()["state"].items():
        assert held.keys() == other.state[theirs[name]].keys()
        assert all(torch.equal(v, other.state[theirs[name]][key]) for key, v in held.items())


@pytest.mark.parametrize("way", ["state", "object"])
def test_a_copy_goes_on_as_it_would_have_where_some_have_had_fewer_steps(way):
    """Each parameter counts its own steps, and what a copy steps are its own parameters."""
    named = parameters()
    one = NamedOptimizer(parse("adamw"), named, 1e-2, 0.1)
    for step, without in enumerate([(), ("p3",)]):
        give(named, step, without)
        one.step()
    twins, other = copy.deepcopy((named, one))
    if way == "state":
        other = NamedOptimizer(parse("adamw"), twins, 1e-2, 0.1)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in (2, 3):
        for each, optimizer in ((named, one), (twins, other)):
            give(each, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(named.values(), twins.values()))
    counts = [{name: float(held["step"]) for name, held in o.state_dict()["state"].items()} for o in (one, other)]
    assert counts[0] == counts[1] == {name: 3.0 if name == "p3" else 4.0 for name in named}


def test_a_copy_made_while_all_are_stepped_as_one_steps_its_own():
    named = parameters()
    one = NamedOptimizer(parse("adamw"), named, 1e-2, 0.1)
    give(named, 0)
    one.step()
    twins, other = copy.deepcopy((named, one))
    for each, optimizer in ((named, one), (twins, other)):
        give(each, 1)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(named.values(), twins.values()))


def test_parameters_of_one_memory_are_each_stepped():
    def tied() -> dict[str, nn.Parameter]:
        whole = torch.ones(4)
        return {"a": nn.Parameter(whole), "b": nn.Parameter(whole), "c": nn.Parameter(torch.ones(3))}

    ours, theirs = tied(), tied()
    one = NamedOptimizer(parse("adamw"), ours, 1e-2, 0.1)
    other = torch.optim.AdamW(theirs.values(), 1e-2, weight_decay=0.1, foreach=True)
    for step in range(3):
        give(ours, step)
        give(theirs, step)
        one.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.values(), theirs.values()))


def test_a_step_is_of_one_parameter_and_the_large_ones():
    named = parameters()
    optimizer = NamedOptimizer(parse("adamw"), named, 1e-2)
    give(named, 0)
    optimizer.step()
    assert len(optimizer.inner.state) == 3  # the numbers without dimensions and the large ones are by themselves
    assert [group["params"] for group in optimizer.inner.param_groups] == [[], list(named.values())]
    optimizer.zero_grad()
    assert all(p.grad is None for p in named.values())


def test_a_state_goes_on_from_where_it_was_saved():
    named = parameters()
    optimizer = NamedOptimizer(parse("adamw"), named, 1e-2)
    for step in range(2):
        give(named, step)
        optimizer.step()
    saved, again = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(named)
    resumed = NamedOptimizer(parse("adamw"), again, 1e-2)
    give(again, 7)
    resumed.step()  # what it then has of its own is dropped
    resumed.load_state_dict(saved)
    for p, q in zip(again.values(), named.values()):
        p.data.copy_(q.data)
    for step in range(2, 4):
        for held, one in ((named, optimizer), (again, resumed)):
            give(held, step)
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(named.values(), again.values()))


def test_weights_that_are_set_between_steps_are_stepped_from():
    ours, theirs = parameters(), parameters()
    one, other = NamedOptimizer(parse("adamw"), ours, 1e-2, 0.1), plain(theirs)
    for step in range(3):
        for named, optimizer in ((ours, one), (theirs, other)):
            give(named, step)
            optimizer.step()
            with torch.no_grad():
                named["p3"].mul_(0.5)
    assert all(torch.equal(p, q) for p, q in zip(ours.values(), theirs.values()))


@pytest.mark.parametrize("text", ["adamw(foreach=True)", "adamw(fused=True)", "sgd(momentum=0.9)", "torch.optim:NAdam"])
def test_other_optimisers_step_each_by_itself(text):
    named = parameters()
    optimizer = NamedOptimizer(parse(text), named, 1e-2)
    give(named, 0)
    optimizer.step()
    assert len(optimizer.inner.state) == len(named)
