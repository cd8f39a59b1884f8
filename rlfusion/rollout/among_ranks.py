"""Rollouts for several ranks: each has the trajectories of all items, whoever ran them."""

from collections.abc import Sequence

from rlfusion.common.frames import joined_blobs, split_blobs
from rlfusion.common.weights import Weights
from rlfusion.rollout.backend import Backend, Pending, check_versions
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.local import Local
from rlfusion.rollout.task import idle, moves, run_item
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.rollout.wire import from_wire, to_wire
from rlfusion.training.ranks import Ranks


class AmongRanks(Backend):
    """A backend of every rank, each of which runs its turn of the items; or (``whole``) one of the first rank alone,
    which runs all of them while the others, with ``inner`` None, wait.
    """

    def __init__(self, inner: Backend | None, ranks: Ranks, whole: bool) -> None:
        self.inner, self.ranks, self.whole = inner, ranks, whole

    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        check_versions(items, weights)
        own = list(items) if self.whole else list(items)[self.ranks.rank :: self.ranks.count]
        pending = self.inner.submit(own, weights) if self.inner is not None and own else list
        return lambda: self._all(pending(), len(items))

    def _all(self, own: list[Trajectory], count: int) -> list[Trajectory]:
        """The trajectories of all items, in their order."""
        wired = [part for trajectory in own for part in _wired(trajectory)]
        found = [_unwired(split_blobs(blob)) for blob in self.ranks.exchange(joined_blobs(wired))]
        if self.whole:
            return found[0]
        return [found[i % self.ranks.count][i // self.ranks.count] for i in range(count)]

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
        super().__init__(acting, ranks, whole=False)
        self.acting = acting

    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        check_versions(items, weights)
        return lambda: self._all(self._walked(items, weights), len(items))

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
