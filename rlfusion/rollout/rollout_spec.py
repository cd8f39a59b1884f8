"""The part of a rollout that a learner takes: workers run exactly that, and send nothing more."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import stream
from rlfusion.rollout.item import WorkItem


@dataclass(frozen=True)
class Window:
    """Some of a chain's stochastic steps: ``size`` of them, moved by ``stride`` steps from noise towards data every
    ``every`` rollouts; the last ones come whole, and then the first ones again.
    """

    size: int
    stride: int = 1
    every: int = 1

    def of(self, steps: Tensor, iteration: int) -> Tensor:
        """Those of ``steps``, falling in noise, in a rollout."""
        places = -(-(len(steps) - self.size) // self.stride) + 1
        first = min(iteration // self.every % places * self.stride, len(steps) - self.size)
        return steps[first : first + self.size]


@dataclass(frozen=True)
class RolloutSpec:
    """Which part of a walk of K steps is run and kept.

    Attributes:
        first, last: the step, 0..K, before which each walk's kept part begins; drawn per walk where they differ.
        path: keep every state from there on, with the log-probabilities of its steps; only with first = last = 0.
        end: walk to the end and score it; else the walk stops where its kept part begins, and nothing is scored.
        window: the steps that take the chain's noise; the others are of the probability-flow ODE, DDIM(eta=0), and have
            no log-probability. None: every step is the chain's own.
    """

    first: int = 0
    last: int = 0
    path: bool = True
    end: bool = True
    window: Window | None = None

    def __post_init__(self) -> None:
        if isinstance(self.window, Mapping):  # as JSON has it
            object.__setattr__(self, "window", Window(**self.window))
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


def transitions(window: Window | None = None) -> RolloutSpec:
    """Every state, action and log-probability, and the reward: policy gradients."""
    return RolloutSpec(window=window)


def samples(steps: int) -> RolloutSpec:
    """The ends of the walks of ``steps`` steps and their rewards: regression on scored samples."""
    return RolloutSpec(steps, steps, path=False)


def prefix(first: int, last: int) -> RolloutSpec:
    """The state before a step drawn from first..last: the learner goes on from it with gradients."""
    return RolloutSpec(first, last, path=False, end=False)
