"""Rollouts for several ranks: each has the rewards of all items, and the walks of its own shares, whoever ran them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from rlfusion.common.frames import joined_blobs, split_blobs
from rlfusion.common.weights import Weights
from rlfusion.rollout.backend import Away, Backend, Pending, Pool, check_versions
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.local import Local
from rlfusion.rollout.parted import Parted
from rlfusion.rollout.task import idle, moves, run_item
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.rollout.wire import from_wire, states_of, to_wire
from rlfusion.training.ranks import Ranks, Shelf


class AmongRanks(Backend):
    """A backend of every rank, each of which runs some of the items; or (``whole``) one of the first rank alone,
    which runs all of them while the others, with ``inner`` None, wait. ``split`` is whether the network
    that learns is.
    """

    def __init__(self, inner: Backend | None, ranks: Ranks, whole: bool, split: bool) -> None:
        self.inner, self.ranks, self.whole, self.split, self.fetched = inner, ranks, whole, split, 0

    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        check_versions(items, weights)
        if self.whole and (shelf := self.ranks.shelf) is not None:
            waits = self.inner.submit_apart(items, weights) if isinstance(self.inner, Pool) else list
            return lambda: self._fetched(waits(), shelf)
        runners = self._runners(items)
        own = [item for item, rank in zip(items, runners) if rank == self.ranks.rank]
        pending = self.inner.submit(own, weights) if self.inner is not None and own else list
        return lambda: self._dealt(items, runners, pending())

    def _runners(self, items: Sequence[WorkItem]) -> list[int]:
        """The rank that runs each item: the one in whose part of the rollout its middle is."""
        walks, ends = sum(map(len, items)), list(accumulate(map(len, items)))
        middles = [2 * end - len(item) - 1 for item, end in zip(items, ends)]
        return [0 if self.whole else middle * self.ranks.count // (2 * walks) for middle in middles]

    def _dealt(self, items: Sequence[WorkItem], runners: list[int], own: list[Trajectory]) -> list[Trajectory]:
        """One record of all items: every rank has its rewards and prompts, and the walks of its own shares."""
        found = [iter(heads) for heads in self._heads([replace(one, x=one.x[:0]) for one in own])]
        joined = concatenate([next(found[rank]) for rank in runners])
        numbers = torch.arange(len(joined)).split([len(item) for item in items])
        none = numbers[0][:0]
        at = [
            torch.cat([none, *(n for n, r in zip(numbers, runners) if r == rank)]) for rank in range(self.ranks.count)
        ]
        rows = concatenate(own).x.cpu() if own else joined.x
        return self._parted(joined, self.ranks.deal(rows, at, self.ranks.dealt(len(joined), self.split)))

    def _heads(self, own: list[Trajectory]) -> list[list[Trajectory]]:
        """What every rank has of its items, without their states."""
        blob = joined_blobs(part for head in own for part in _wired(head))
        return [_unwired(split_blobs(one)) for one in self.ranks.exchange(blob)]

    def _parted(self, joined: Trajectory, held: Tensor) -> list[Trajectory]:
        return [replace(joined, x=Parted(held, len(joined), self.ranks, self.split))]

    def _fetched(self, away: list[Away], shelf: Shelf) -> list[Trajectory]:
        """The same of walks that lie in a store: each rank fetches those of its own shares."""
        self.fetched += 1
        if away:
            shelf.put(self.fetched, [(one.sha256, one.where) for one in away])
        heads = self._heads([one.head for one in away])[0]
        wanted = self.ranks.dealt(sum(map(len, heads)), self.split)[self.ranks.rank]
        places, first, rows = shelf.get(self.fetched), 0, [heads[0].x]
        for head, (sha256, where) in zip(heads, places, strict=True):
            walks = wanted[(wanted >= first) & (wanted < first + len(head))] - first
            if len(walks):
                states = shelf.fetch(where)
                self.ranks.received += states.nbytes
                rows.append(states_of(states, sha256, head, walks))
            first += len(head)
        return self._parted(concatenate(heads), torch.cat(rows))

    def moved(self) -> dict[str, int]:
        received, self.ranks.received = self.ranks.received, 0
        return {**(self.inner.moved() if self.inner is not None else {}), "walks_to_rank": received}

    def require_room(self, weights: int, versions: int, answer: int) -> None:
        if self.inner is not None:
            self.inner.require_room(weights, versions, answer)

    def close(self) -> None:
        if self.inner is not None:
            self.inner.close()


class InStep(AmongRanks):
    """A backend of every rank where the network is split: all walk at the same time, and one whose walk is shorter, or
    that has none, calls the network for nothing, so that all call it equally often.
    """

    def __init__(self, acting: Local, ranks: Ranks) -> None:
        super().__init__(acting, ranks, whole=False, split=True)
        self.acting = acting

    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        check_versions(items, weights)
        return lambda: self._dealt(items, self._runners(items), self._walked(items, weights))

    def _runners(self, items: Sequence[WorkItem]) -> list[int]:
        """They take turns, so that neighbours are walked at the same time."""
        return [i % self.ranks.count for i in range(len(items))]

    def _walked(self, items: Sequence[WorkItem], weights: Weights) -> list[Trajectory]:
        task, rank, found = self.acting.task, self.ranks.rank, []
        self.acting.load(weights)
        for first in range(0, len(items), self.ranks.count):
            together = items[first : first + self.ranks.count]
            rest = max(moves(task, item) for item in together)
            if rank < len(together):
                found.append(run_item(task, together[rank]))
                rest -= moves(task, together[rank])
            idle(task, rest)
        return found


def _wired(trajectory: Trajectory) -> tuple[bytes, bytes]:
    text, blob = to_wire(trajectory)
    return text.encode(), blob


def _unwired(parts: list[bytes]) -> list[Trajectory]:
    return [from_wire(text.decode(), blob) for text, blob in zip(parts[::2], parts[1::2])]
