"""AdamW beside torch's own class: the same bits, without its import."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from rlfusion.training.adamw import AdamW


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))


def descend(net: nn.Module, optimizer, rates: list[float], set_rate, skip: tuple[int, ...] = ()) -> None:
    for i, rate in enumerate(rates):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(i))
        net(x).square().mean().backward()
        if i in skip:
            net[2].bias.grad = None
        set_rate(rate)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_bit_for_bit_torchs(weight_decay):
    ours, theirs = network(), network()
    rates = [1e-2, 3e-3, 1e-2, 5e-2, 1e-4]
    mine = AdamW(dict(ours.named_parameters()), 1.0, weight_decay)
    descend(ours, mine, rates, lambda r: setattr(mine, "lr", r), skip=(0, 3))
    reference = torch.optim.AdamW(theirs.parameters(), lr=1.0, weight_decay=weight_decay)
    descend(theirs, reference, rates, lambda r: reference.param_groups[0].update(lr=r), skip=(0, 3))
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert not torch.equal(next(ours.parameters()), next(network().parameters()))


def test_its_state_continues_bit_for_bit():
    straight, resumed = network(), network()
    a = AdamW(dict(straight.named_parameters()), 1e-2)
    descend(straight, a, [1e-2] * 3, lambda r: None)
    resumed.load_state_dict(straight.state_dict())
    b = AdamW(dict(resumed.named_parameters()), 1e-2)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for net, optimizer in ((straight, a), (resumed, b)):
        descend(net, optimizer, [1e-2] * 3, lambda r: None)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters()))


def test_a_learning_rate_that_is_set_holds_whatever_the_state_was_saved_with():
    net = network()
    a, b = (AdamW(dict(net.named_parameters()), lr) for lr in (1e-2, 3e-2))
    descend(net, a, [1e-2], lambda r: None)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert b.lr == 3e-2


def test_it_imports_no_compiler():
    code = (
        "import sys, torch; from rlfusion.training.adamw import AdamW\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = p.clone()\n"
        "o = AdamW({'p': p}, 0.1); o.step(); o.zero_grad(); o.load_state_dict(o.state_dict())\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
