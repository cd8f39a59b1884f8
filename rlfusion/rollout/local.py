"""The in-process backend: the default, and the meaning of every other."""

from collections.abc import Sequence

from rlfusion.common.weights import Weights
from rlfusion.rollout.backend import Backend, Pending, check_versions
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.task import Task, run_item
from rlfusion.rollout.trajectory import Trajectory, gathered


class Local(Backend):
    """Runs items one after another in the caller's thread, when their results are asked for."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._loaded: object = None

    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        check_versions(items, weights)
        return lambda: self._run(items, weights)

    def _run(self, items: Sequence[WorkItem], weights: Weights) -> list[Trajectory]:
        self.load(weights)
        return gathered((run_item(self.task, item) for item in items), sum(map(len, items)))

    def load(self, weights: Weights) -> None:
        """Act under these weights from here on."""
        if weights.mark != self._loaded:
            weights.load_into(self.task.policy)
            self._loaded = weights.mark

    def close(self) -> None:
        """Nothing is held."""
