"""What one rank finds is known to all: an error of its own share, and what the first alone has made. Ranks are threads
here, which meet where ranks meet.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from rlfusion.common.errors import NumericalError
from rlfusion.training.ranks import Ranks


class Meeting:
    """Where threads hand each other bytes, and wait for all."""

    def __init__(self, count: int) -> None:
        self.barrier, self.held = threading.Barrier(count, timeout=20), [b""] * count

    def __call__(self, rank: int, blob: bytes) -> list[bytes]:
        self.held[rank] = blob
        self.barrier.wait()
        told = list(self.held)
        self.barrier.wait()
        return told


class Threaded(Ranks):
    """Ranks that meet in a ``Meeting``."""

    meeting: Meeting

    def exchange(self, blob: bytes) -> list[bytes]:
        return self.meeting(self.rank, blob)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        yield


def each(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` gives, or raises, on each of so many ranks."""
    Threaded.meeting, told = Meeting(count), [None] * count

    def run(rank: int) -> None:
        try:
            told[rank] = work(Threaded(rank, count, count))
        except NumericalError as error:
            told[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return told


def test_what_is_not_finite_on_one_rank_is_an_error_on_all_and_leaves_nothing_behind():
    def work(ranks: Ranks) -> Any:
        net, rows = nn.Linear(3, 1), ranks.share(torch.arange(6), 6)

        def body(some: torch.Tensor) -> tuple[torch.Tensor, dict]:
            if 5 in some:
                raise NumericalError("the reward of walk 5 is nan")
            return net(torch.ones(len(some), 3)).sum(), {"row": some}

        try:
            ranks.accumulate(net, rows, 2, body)
        finally:
            ranks.reduce([])
            assert net.weight.grad is None
            assert not ranks._sums

    texts = [str(error) for error in each(3, work)]
    assert texts == ["the reward of walk 5 is nan (on rank 2)"] * 2 + ["the reward of walk 5 is nan"]


def test_without_an_error_each_rank_has_the_records_of_all():
    def work(ranks: Ranks) -> Any:
        net = nn.Linear(3, 1)
        body = lambda some: (net(torch.ones(len(some), 3)).sum(), {"row": some})  # noqa: E731
        return torch.cat([r["row"] for r in ranks.accumulate(net, ranks.share(torch.arange(6), 6), 2, body)]).tolist()

    assert each(3, work) == [list(range(6))] * 3


def test_what_the_first_makes_is_made_once_and_is_everywhere():
    made = []

    def make() -> Any:
        made.append(1)
        return {"reward": 0.1 + 0.2, "worst": float("-inf"), "why": "none"}

    told = each(3, lambda ranks: ranks.by_first(make))
    assert told == [{"reward": 0.1 + 0.2, "worst": float("-inf"), "why": "none"}] * 3
    assert made == [1]


def test_one_process_makes_it_itself():
    thing = object()
    assert Ranks().by_first(lambda: thing) is thing


@pytest.mark.parametrize("kind", [KeyError, ValueError])
def test_other_errors_are_the_rank_s_own(kind):
    net = nn.Linear(3, 1)

    def body(some: torch.Tensor) -> tuple[torch.Tensor, dict]:
        raise kind("mine")

    with pytest.raises(kind, match="mine"):
        Ranks(shares=2).accumulate(net, torch.tensor([0, 1]), 2, body)
