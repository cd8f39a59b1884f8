"""Parameters in files: the bits of those in memory, shared where they were, and refused where there is no room."""

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from rlfusion import models
from rlfusion.common import hollow, on_disk
from rlfusion.common.errors import StorageError
from rlfusion.models import Card, Config

CARD = Card(Config("ResidualMLP(width=32, depth=2)", "Cosine()", "x0"), (1, 8, 8), ("a", "b"))


class Odd(nn.Module):
    """Draws, scales and shares its parameters in all the ways of networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.none = nn.Linear(3, 4), None
        self.register_parameter("nothing", None)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.first.weight
        shared = nn.Parameter(torch.randn(2))
        self.table = nn.ModuleList(nn.Module() for _ in range(2))
        for part in self.table:
            part.shared = shared
        self.embedding = nn.Parameter(torch.randn(2, 3, dtype=torch.float64).T * 0.02)
        self.number, self.halved = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.randn(0, 3), requires_grad=False)
        self.several = nn.ParameterList([torch.randn(2), torch.randn(3)])
        nn.init.orthogonal_(self.first.weight)
        with torch.no_grad():
            self.tied.bias.mul_(float(self.first.weight.sum()))
        self.register_buffer("held", self.first.bias.detach() * 2)


def _odd() -> Odd:
    torch.manual_seed(0)
    return Odd()


def mapped(p: torch.Tensor) -> bool:
    """Whether a tensor is in a mapped file without a name."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(at, 16) for at in line.split()[0].split("-"))
        if low <= p.data_ptr() < high:
            return "(deleted)" in line
    return False


def test_they_have_the_bits_of_those_in_memory():
    expected = _odd()
    with on_disk.parameters():
        found = _odd()
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert found.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(found.state_dict()[name], value), name
    assert found.tied.weight is found.first.weight
    assert found.table[0].shared is found.table[1].shared
    assert len(list(found.parameters())) == len(list(expected.parameters()))
    assert not found.empty.requires_grad
    assert found.halved.requires_grad
    assert nn.Module.register_parameter is nn.Linear.register_parameter
    grown = _odd()
    for net in (found, grown):
        (net.first(net.embedding.float().T).sum() + net.number).backward()
        torch.optim.SGD(net.parameters(), 0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), grown.parameters(), strict=True))


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="reads /proc")
def test_they_are_in_files_and_only_where_that_is_wanted():
    with on_disk.parameters():
        found = _odd()
    assert all(mapped(p) for p in found.parameters() if p.numel())
    with on_disk.parameters(False):
        plain = _odd()
    assert not any(mapped(p) for p in [*plain.parameters(), *_odd().parameters(), *copy.deepcopy(found).parameters()])


@pytest.mark.parametrize("at_once", [on_disk.AT_ONCE, 1, 100])
def test_a_model_is_read_into_files(at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "AT_ONCE", at_once)
    expected = models.build(CARD, 3)
    models.save(tmp_path, expected, CARD)
    found, card = models.load_on_disk(tmp_path)
    assert card == CARD
    assert not hollow.is_hollow(found)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_a_full_disk_is_said_in_a_line(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"No space left.* for 48 bytes of a network .*TMPDIR"), on_disk.parameters():
        nn.Linear(3, 4)
    assert nn.Module.register_parameter is nn.Linear.register_parameter


def test_what_has_no_rows_is_read_as_well():
    net = nn.Module()
    with hollow.parameters():
        net.number, net.none = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0, 3))
    on_disk.fill(net, {net.none: lambda rows: torch.ones(0, 3)[rows]})
    assert (net.number.shape, net.none.shape) == ((), (0, 3))
    assert not hollow.is_hollow(net)
