"""Walks whose steps keep their graph, so that the learner's forward pass is the rollout's own.

    (1)  grad J = sum_i A_i sum_{t in W} grad log p_theta(x_s | x_t, c) is linear in the advantages A_i, which the
         rewards decide at the end. A graph of the means of the steps W is all that it takes; one backward pass of
         sum_i A_i log p gives it, and there is no second forward pass

The policy that walks is the learner's own, at the weights that the update begins with. Each step begins with a
constant, so the graphs of the steps do not hang together, and as many activations are held as W has steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.policy import Observation
from rlfusion.rollout.trajectory import TENSORS, Trajectory


@dataclass(frozen=True)
class Graphed(Trajectory):
    """Walks with the means of the steps that are learned from.

    Attributes:
        mean: (B, K, *), of each step of W, with its graph, which serves one backward pass; 0 elsewhere.
        trained: the steps W, int64.
    """

    TENSORS: ClassVar[tuple[str, ...]] = (*TENSORS, "mean")
    mean: Tensor = field(kw_only=True)
    trained: Tensor = field(kw_only=True)

    def learned(self) -> tuple[Tensor, Tensor]:
        """(walk, step) of the transitions of W, walk by walk."""
        return torch.arange(len(self)).repeat_interleave(len(self.trained)), self.trained.repeat(len(self))


class Graphs:
    """The steps of the walks of one item; those of ``trained`` keep their graph."""

    def __init__(self, trained: Tensor) -> None:
        self.trained, self._wanted = trained, frozenset(trained.tolist())
        self._means: list[Tensor] = []

    def __call__(self, policy: Callable[[Observation], Gaussian], obs: Observation, k: int) -> Gaussian:
        """The transition of step k, without a graph: its own is kept here. Within torch.no_grad."""
        with torch.set_grad_enabled(k in self._wanted):
            found = policy(obs)
        self._means.append(found.mean if k in self._wanted else torch.zeros_like(found.mean))
        return Gaussian(found.mean.detach(), found.std.detach())

    def of(self, walks: Trajectory) -> Graphed:
        """The walks of the item, whole, with what was kept."""
        with torch.enable_grad():
            mean = torch.stack(self._means, 1)
        return Graphed(**vars(walks), mean=mean, trained=self.trained)
