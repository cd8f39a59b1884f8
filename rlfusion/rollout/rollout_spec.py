"""The part of a rollout that a learner takes: workers run exactly that, and send nothing more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.common.seeding import stream, streams
from rlfusion.rollout.item import WorkItem

Start = Literal["own", "prompt"]
"""Whose noise a walk begins with."""


@dataclass(frozen=True)
class Window:
    """Some of a chain's stochastic steps: ``size`` of them, moved by ``stride`` steps from noise towards data every
    ``every`` rollouts; the last ones come whole, and then the first ones again. Where walks take noise in them alone,
    one step after them takes ``leap`` of the chain's at once.
    """

    size: int
    stride: int = 1
    every: int = 1
    leap: int = 1

    def of(self, steps: Tensor, iteration: int) -> Tensor:
        """Those of ``steps``, falling in noise, in a rollout."""
        places = -(-(len(steps) - self.size) // self.stride) + 1
        first = min(iteration // self.every % places * self.stride, len(steps) - self.size)
        return steps[first : first + self.size]

    def times(self, times: Tensor, steps: Tensor, iteration: int) -> Tensor:
        """The times that walks are at in a rollout, of all ``times`` (K+1,) of the chain with these stochastic
        ``steps``: each up to the end of the window, then every ``leap``-th, and the last.
        """
        end, last = int(self.of(steps, iteration)[-1]) + 1, len(times) - 1
        return times[[*range(end), *range(end, last, self.leap), last]]


@dataclass(frozen=True)
class Trained:
    """The steps of walks that are learned from: of all stochastic ones, or those of ``window``, the share ``fraction``,
    drawn for each rollout.
    """

    window: Window | None = None
    fraction: float = 1.0

    def of(self, noisy: Sequence[bool], item: WorkItem) -> Tensor:
        """The numbers of these steps in the walks of ``item``, of whose steps these take noise; falling in noise."""
        steps = torch.tensor(noisy).nonzero().flatten()
        steps = steps if self.window is None else self.window.of(steps, item.iteration)
        drawn = stream(item.seed, "trained", item.iteration).permutation(len(steps))[: self._share(len(steps))]
        return steps[torch.from_numpy(drawn).sort().values]

    def most(self, steps: int) -> int:
        """The steps of a walk of so many that are learned from, at most."""
        return self._share(steps if self.window is None else min(steps, self.window.size))

    def _share(self, steps: int) -> int:
        return max(1, round(self.fraction * steps))


@dataclass(frozen=True)
class RolloutSpec:
    """Which part of a walk of K steps is run and kept.

    Attributes:
        first, last: the step, 0..K, before which each walk's kept part begins; drawn per walk where they differ.
        path: keep every state from there on, with the log-probabilities of its steps; only with first = last = 0.
        end: walk to the end and score it; else the walk stops where its kept part begins, and nothing is scored.
        window: the steps that take the chain's noise; the others are of the probability-flow ODE, DDIM(eta=0), and have
            no log-probability. None: every step is the chain's own.
        trained: the steps that keep their graph (``graphed``), where the learner's own policy walks; None for none.
        start: with whose noise a walk begins: its "own", or one for all walks of its "prompt" (``shared``); without
            conditions all are of one.
    """

    first: int = 0
    last: int = 0
    path: bool = True
    end: bool = True
    window: Window | None = None
    trained: Trained | None = None
    start: Start = "own"

    def __post_init__(self) -> None:
        if isinstance(self.window, Mapping):  # as JSON has it
            object.__setattr__(self, "window", Window(**self.window))
        if self.start not in get_args(Start):
            raise unknown("start", str(self.start), get_args(Start))
        if not 0 <= self.first <= self.last:
            raise ConfigError(f"first, last = {self.first}, {self.last}: expected 0 <= first <= last")
        if self.trained is not None and not self.path:
            raise ConfigError(f"{self}: the graph of steps is that of a kept path, expected path, or trained None")
        if self.path and (self.last or not self.end):
            raise ConfigError(f"{self}: a kept path is that of whole walks, expected first = last = 0 and end")

    def begin(self, item: WorkItem) -> Tensor:
        """The step where each sample of ``item`` begins, (B,) int64: a pure function of the sample's number."""
        if self.first == self.last:
            return torch.full((len(item),), self.first)
        drawn = streams((item.seed, "begin", item.iteration), item.samples)
        return torch.tensor([int(of.integers(self.first, self.last + 1)) for of in drawn])


def transitions(window: Window | None = None, trained: Trained | None = None, start: Start = "own") -> RolloutSpec:
    """Every state, action and log-probability, and the reward: policy gradients."""
    return RolloutSpec(window=window, trained=trained, start=start)


def samples(steps: int) -> RolloutSpec:
    """The ends of the walks of ``steps`` steps and their rewards: regression on scored samples."""
    return RolloutSpec(steps, steps, path=False)


def prefix(first: int, last: int) -> RolloutSpec:
    """The state before a step drawn from first..last: the learner goes on from it with gradients."""
    return RolloutSpec(first, last, path=False, end=False)
