"""Walks of a prompt that begin with one noise: up to the first step that takes noise they are one walk, walked once.

(1)  z_0 of prompt c in rollout n has the stream (seed, "rollout", n, "start", c), whatever item it falls in
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlfusion.common.seeding import normals
from rlfusion.common.tensors import map_cond
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.policy import Observation
from rlfusion.rollout.item import WorkItem


class Prompts:
    """The prompts of an item, each by its first walk."""

    def __init__(self, item: WorkItem) -> None:
        self.item, self.names = item, list(dict.fromkeys(item.groups))
        place = {name: i for i, name in enumerate(self.names)}
        self.first = torch.tensor([item.groups.index(name) for name in self.names])
        self.of_walk = torch.tensor([place[name] for name in item.groups])

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Eq. (1), z_0 of every walk (B, *shape)."""
        key = (self.item.seed, "rollout", self.item.iteration, "start")
        return next(normals(key, self.names, 1, shape))[self.of_walk]

    def once(self, policy: Callable[[Observation], Gaussian], obs: Observation) -> Gaussian:
        """The transition of all walks, which are in the state of their prompt's first: the policy is asked for that."""
        first, of_walk = self.first.to(obs.x.device), self.of_walk.to(obs.x.device)
        cond = map_cond(lambda c: c[first.to(c.device)], obs.cond)
        found = policy(obs._replace(x=obs.x[first], cond=cond))
        return Gaussian(found.mean[of_walk], found.std)
