"""The record of a batch of walks."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rlfusion.policy import Observation
from rlfusion.tensors import Cond, cat_cond, map_cond


@dataclass(frozen=True)
class Trajectory:
    """B walks of K steps. B is the batch; ``*`` the shape of a latent.

    Attributes:
        x: (B, K+1, *); x[:, 0] is the noise, x[:, -1] the sample.
        times: (K+1,) float64 on the CPU, falling from noise to data.
        log_prob: (B, K) under the weights that acted, summed over features; NaN where a step has no density (S = 0).
        reward: (B,), of the end of the walk.
        group: (B,) int64; rewards are compared within a group (a prompt).
        cond: the condition, batch B.
        version: the version of the weights that acted.
    """

    x: Tensor
    times: Tensor
    log_prob: Tensor
    reward: Tensor
    group: Tensor
    cond: Cond
    version: int

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def steps(self) -> int:
        """K."""
        return len(self.times) - 1

    def transitions(self, walk: Tensor, step: Tensor) -> tuple[Observation, Tensor]:
        """The transitions (walk[i], step[i]), i = 1..N, as one batch: the observation and the action x_s (N, *)."""
        cond = map_cond(lambda c: c[walk.to(c.device)], self.cond)
        at, k = walk.to(self.x.device), step.to(self.x.device)
        t, s = self.times[step.cpu()], self.times[step.cpu() + 1]
        return Observation(self.x[at, k], t, s, cond), self.x[at, k + 1]

    def to(self, device: torch.device | str) -> Self:
        """The same record with its tensors on ``device``; times stay on the CPU."""
        move = {name: getattr(self, name).to(device) for name in ("x", "log_prob", "reward", "group")}
        return type(self)(
            **move, times=self.times, cond=map_cond(lambda c: c.to(device), self.cond), version=self.version
        )


def concatenate(parts: list[Trajectory]) -> Trajectory:
    """One trajectory from several of the same chain and weights.

    Raises:
        ValueError: the parts differ in their times or in the version of their weights.
    """
    first = parts[0]
    if any(p.version != first.version or not torch.equal(p.times, first.times) for p in parts):
        raise ValueError(f"cannot join walks of weights {sorted({p.version for p in parts})} or of different times")
    join = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("x", "log_prob", "reward", "group")}
    return Trajectory(**join, times=first.times, cond=cat_cond([p.cond for p in parts]), version=first.version)
