"""The in-process backend: the default, and the meaning of every other.

Items are run one after another. With ``overlap`` the end of each, its samples and their reward, is brought by a thread
while the next is walked: one at a time and in their order, so that the reward is asked what it is without.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle

from rlfusion.common.beside import Beside
from rlfusion.common.weights import Weights
from rlfusion.rollout.backend import Backend, Pending, check_versions
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.task import Task, run_item, walked
from rlfusion.rollout.trajectory import Trajectory, gathered
from rlfusion.training.stages import REWARD, stage


class Local(Backend):
    """Runs items in the caller's thread, when their results are asked for."""

    def __init__(self, task: Task, overlap: bool = False) -> None:
        self.task, self.overlap = task, overlap
        self._twins = (task, replace(task)) if overlap else (task,)  # each has an environment and terms of its own
        self._loaded: object = None

    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        check_versions(items, weights)
        return lambda: self._run(items, weights)

    def _run(self, items: Sequence[WorkItem], weights: Weights) -> list[Trajectory]:
        self.load(weights)
        parts = self._overlapped(items) if self.overlap else (run_item(self.task, item) for item in items)
        return gathered(parts, sum(map(len, items)))

    def _overlapped(self, items: Sequence[WorkItem]) -> Iterator[Trajectory]:
        """The reward of an item is computed while the next one is walked. Of several errors the first item's counts."""
        scored: Beside[Trajectory] | None = None
        for item, task in zip(items, cycle(self._twins)):
            try:
                end = walked(task, item)
            except Exception:
                if scored is not None:
                    scored.result()
                raise
            if scored is not None:
                yield _waited(scored)
            scored = Beside("reward", end)
        if scored is not None:
            yield _waited(scored)

    def load(self, weights: Weights) -> None:
        """Act under these weights from here on."""
        if weights.mark != self._loaded:
            weights.load_into(self.task.policy)
            self._loaded = weights.mark

    def close(self) -> None:
        """Nothing is held."""


def _waited(scored: Beside[Trajectory]) -> Trajectory:
    """An item whose reward was begun: what is waited for is the reward's time."""
    with stage(REWARD):
        return scored.result()
