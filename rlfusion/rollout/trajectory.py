"""The record of a batch of walks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rlfusion.common.tensors import Cond, cat_cond, map_cond, moved
from rlfusion.diffusion.policy import Observation
from rlfusion.diffusion.rows import of_chain
from rlfusion.rollout.parted import Parted, at_steps, taken

TENSORS = ("x", "log_prob", "reward", "group", "begin", "terms", "cached")
"""The tensors of batch B of a record, where it has them."""


@dataclass(frozen=True)
class Trajectory:
    """B walks of K steps, or the part of them that was asked for. B is the batch; ``*`` the shape of a latent.

    Attributes:
        x: (B, K+1, *): x[:, 0] is the noise, x[:, -1] the sample; or (B, 1, *), the one state that was kept. On one of
            several ranks it is ``parted``.
        times: (K+1,) float64 on the CPU, falling from noise to data.
        log_prob: (B, K) under the weights that acted, summed over features; NaN where a step has no density (S = 0);
            None where the path was not kept.
        reward: (B,), of the end of the walk; None where it was not walked to its end.
        group: (B,) int64; rewards are compared within a group (a prompt).
        cond: the condition, batch B.
        version: the version of the weights that acted.
        begin: (B,) int64, the step 0..K before which x[:, 0] stands; None for 0 in every walk.
        terms: (B, R), the values of several named rewards before their weights, in their order; None for one reward.
        cached: (B,), the share of the rewards that came from a cache; None without a cache.
        failed: the number of walks that were left out because their reward failed; their rewards count as queries.
    """

    TENSORS: ClassVar[tuple[str, ...]] = TENSORS
    x: Tensor
    times: Tensor
    log_prob: Tensor | None
    reward: Tensor | None
    group: Tensor
    cond: Cond
    version: int
    begin: Tensor | None = None
    terms: Tensor | None = None
    cached: Tensor | None = None
    failed: int = 0

    def __len__(self) -> int:
        return len(self.group)

    @property
    def scored(self) -> Tensor:
        """The rewards (B,) of walks that were walked to their end.

        Raises:
            ValueError: they were not.
        """
        if self.reward is None:
            raise ValueError("the walks have no rewards: they were not walked to their end")
        return self.reward

    @property
    def asked(self) -> int:
        """Rewards that were asked for."""
        return len(self) + self.failed

    @property
    def steps(self) -> int:
        """K."""
        return len(self.times) - 1

    @property
    def features(self) -> int:
        """Numbers of a latent."""
        return math.prod(self.x.shape[2:])

    def whole(self) -> Self:
        """The same record with all walks on every rank, for who keeps them."""
        return replace(self, x=self.x.whole()) if isinstance(self.x, Parted) else self

    def transitions(self, walk: Tensor, step: Tensor) -> tuple[Observation, Tensor]:
        """The transitions (walk[i], step[i]), i = 1..N, as one batch: the observation and the action x_s (N, *)."""
        cond = map_cond(lambda c: c[moved(walk, c.device)], self.cond)
        at, k = moved(walk, self.x.device), moved(step, self.x.device)
        t, s = of_chain(self.times, step.cpu())
        return Observation(at_steps(self.x, at, k), t, s, cond), at_steps(self.x, at, k + 1)

    def take(self, walks: Tensor) -> Self:
        """The walks of a mask (B,) or of indices alone."""
        kept: dict[str, Any] = {name: taken(value, walks) for name, value in _kept(self).items()}
        return replace(self, **kept, cond=map_cond(lambda c: c[walks.to(c.device)], self.cond))

    def to(self, device: torch.device | str) -> Self:
        """The same record with its tensors on ``device``; times stay on the CPU."""
        move: dict[str, Any] = {name: value.to(device) for name, value in _kept(self).items()}
        return replace(self, **move, cond=map_cond(lambda c: c.to(device), self.cond))


def _kept(t: Trajectory) -> dict[str, Any]:
    """The tensors of batch B that a record has, by name."""
    held = {name: getattr(t, name) for name in t.TENSORS}
    return {name: value for name, value in held.items() if value is not None}


def concatenate(parts: list[Trajectory]) -> Trajectory:
    """One trajectory from several of the same chain, weights and kept parts.

    Raises:
        ValueError: the parts differ in their times or in the version of their weights.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(p.version != first.version or not torch.equal(p.times, first.times) for p in parts):
        raise ValueError(f"cannot join walks of weights {sorted({p.version for p in parts})} or of different times")
    join: dict[str, Any] = {name: _cat([getattr(p, name) for p in parts]) for name in _kept(first)}
    return replace(first, **join, cond=cat_cond([p.cond for p in parts]))


def gathered(parts: Iterator[Trajectory], walks: int) -> list[Trajectory]:
    """The parts, one after another, with the states of all in one tensor of so many ``walks``: ``concatenate`` joins
    them without a copy, and no more than the states of one part are held twice.
    """
    found: list[Trajectory] = []
    whole, done = None, 0
    for part in parts:
        if len(part) == walks:
            return [part]
        if whole is None:
            whole = part.x.new_empty(walks, *part.x.shape[1:])
        rows = whole[done : done + len(part)]
        rows.copy_(part.x)
        found.append(replace(part, x=rows))
        done += len(part)
        del part  # its own states are not needed while the next part is made
    return found


def _cat(parts: list[Tensor]) -> Tensor:
    """The rows of all parts: themselves where they are neighbours in memory (``gathered``), else a copy."""
    first, rows = parts[0], sum(map(len, parts))
    base = first._base
    if base is not None and base.shape == (rows, *first.shape[1:]) and base.is_contiguous():
        places = [base.data_ptr() + base[:at].nbytes for at in accumulate(map(len, parts[:-1]), initial=0)]
        if [p.data_ptr() for p in parts] == places and all(p._base is base and p.is_contiguous() for p in parts):
            return base
    return torch.cat(parts)
