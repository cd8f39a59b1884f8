"""Learners one after another on one student: halving rounds, a first stage and a second.

Each stage begins from the averages of the one before, and is made when it begins; a checkpoint says in which stage it
was taken, also where that stage was just done, and holds the state of that stage.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlfusion.common.errors import StateError
from rlfusion.common.weights import require_entries
from rlfusion.distill.base import Distiller
from rlfusion.training.optimization import Optimization


class Stage(NamedTuple):
    """``steps`` updates of the learner that ``make`` gives, from the student's weights at that moment on."""

    steps: int
    make: Callable[[], Distiller]


class Staged:
    """The stages as one learner; batches go to the stage whose turn it is."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages, self.at, self.done = stages, 0, 0
        self.learner = stages[0].make()

    @property
    def optimization(self) -> Optimization:
        return self.learner.optimization

    def update(self, batch: Any) -> dict[str, float]:
        """One update of the stage; where the last one is done, the next stage begins."""
        if self.done == self.stages[self.at].steps:
            self.learner.optimization.ema.settle()
            self._begin(self.at + 1)
        metrics = self.learner.update(batch)
        self.done += 1  # a stop within the update leaves the stage as a checkpoint may hold it
        return metrics | {"stage": self.at + metrics.get("stage", 0.0)}  # of stages within the last, theirs go on

    def _begin(self, stage: int) -> None:
        self.at, self.done = stage, 0
        self.learner = self.stages[stage].make()

    def state_dict(self) -> dict:
        return {"stage": self.at, "done": self.done, "learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the stages")
        if not 0 <= state["stage"] < len(self.stages):
            raise StateError(f"the stages: 'stage' is {state['stage']}, and there are {len(self.stages)}")
        self._begin(state["stage"])
        self.done = state["done"]
        self.learner.load_state_dict(state["learner"])


def local_steps(stages: Sequence[int], start: int) -> list[int]:
    """The number of each update from ``start`` on within its own stage, for stages of these lengths."""
    return [n for steps in stages for n in range(steps)][start:]
