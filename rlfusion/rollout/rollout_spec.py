"""The part of a rollout that a learner takes: workers run exactly that, and send nothing more."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import stream
from rlfusion.rollout.item import WorkItem


@dataclass(frozen=True)
class RolloutSpec:
    """Which part of a walk of K steps is run and kept.

    Attributes:
        first, last: the step, 0..K, before which each walk's kept part begins; drawn per walk where they differ.
        path: keep every state from there on, with the log-probabilities of its steps; only with first = last = 0.
        end: walk to the end and score it; else the walk stops where its kept part begins, and nothing is scored.
    """

    first: int = 0
    last: int = 0
    path: bool = True
    end: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ConfigError(f"first, last = {self.first}, {self.last}: expected 0 <= first <= last")
        if self.path and (self.last or not self.end):
            raise ConfigError(f"{self}: a kept path is that of whole walks, expected first = last = 0 and end")

    def begin(self, item: WorkItem) -> Tensor:
        """The step where each sample of ``item`` begins, (B,) int64: a pure function of the sample's number."""
        if self.first == self.last:
            return torch.full((len(item),), self.first)
        key = (item.seed, "begin", item.iteration)
        return torch.tensor([int(stream(*key, i).integers(self.first, self.last + 1)) for i in item.samples])


def transitions() -> RolloutSpec:
    """Every state, action and log-probability, and the reward: policy gradients."""
    return RolloutSpec()


def samples(steps: int) -> RolloutSpec:
    """The ends of the walks of ``steps`` steps and their rewards: regression on scored samples."""
    return RolloutSpec(steps, steps, path=False)


def prefix(first: int, last: int) -> RolloutSpec:
    """The state before a step drawn from first..last: the learner goes on from it with gradients."""
    return RolloutSpec(first, last, path=False, end=False)
