"""AdamW in 8 bits: near AdamW in float32, a quarter of its moments, resumed bit for bit, refused where it cannot be."""

import copy
import sys

import pytest
import torch
from torch import nn

from rlfusion.common.errors import ConfigError
from rlfusion.config import Finetune
from rlfusion.jobs.finetune import check
from rlfusion.training import checkpoint
from rlfusion.training.adamw import AdamW
from rlfusion.training.adamw8bit import AdamW8bit, require
from rlfusion.training.optimization import Optimization

pytest.importorskip("bitsandbytes")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64))


def descend(net: nn.Module, optimizer, steps: range) -> float:
    for i in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(i))
        loss = (net(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def test_it_descends_as_adamw_does_with_a_quarter_of_the_moments():
    exact, short = network(), network()
    theirs, ours = AdamW(dict(exact.named_parameters()), 3e-3), AdamW8bit(dict(short.named_parameters()), 3e-3)
    start = descend(network(), AdamW({}, 1.0), range(1))
    ends = descend(exact, theirs, range(60)), descend(short, ours, range(60))
    assert ends[0] < start / 2
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
    held = ours.state_dict()["state"]["0.weight"]
    assert held["state1"].dtype == held["state2"].dtype == torch.uint8
    assert ours.state_dict()["state"]["0.bias"]["state1"].dtype == torch.float32


def test_its_state_continues_bit_for_bit_through_a_checkpoint(tmp_path):
    straight, resumed = network(), network()
    a = AdamW8bit(dict(straight.named_parameters()), 1e-2)
    descend(straight, a, range(3))
    checkpoint.save(tmp_path, 3, {"optimizer": a.state_dict()})
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    b = AdamW8bit(dict(resumed.named_parameters()), 1e-2)
    b.load_state_dict(checkpoint.load(checkpoint.latest(tmp_path).path)["optimizer"])
    for net, optimizer in ((straight, a), (resumed, b)):
        descend(net, optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters()))


def test_an_optimization_uses_it():
    net = network()
    optimization = Optimization(net, 1e-3, weight_decay=0.1)
    optimization.use(AdamW8bit)
    assert (optimization.optimizer.lr, optimization.optimizer.weight_decay) == (1e-3, 0.1)
    before = net[0].weight.clone()
    net(torch.ones(2, 64)).sum().backward()
    optimization.step()
    assert not torch.equal(before, net[0].weight)
    assert net[0].weight.grad is None


def test_without_the_library_it_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes.*expected adamw"):
        require()
    with pytest.raises(ConfigError, match="optimizer = adamw8bit"):
        check(Finetune(optimizer="adamw8bit"))
