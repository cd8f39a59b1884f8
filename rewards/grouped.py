"""Rewards that compare the samples of one prompt: they need the whole group.

Samples of equal conditions are a group; G of them, x_1..x_G:

    (1)  group-wise: r_1..r_G = f(x_1..x_G, c)
    (2)  pairwise: p_ij = probability that x_i is better than x_j, in [0, 1]; p_ji = 1 - p_ij. Asked both ways round, as
         judges prefer a place:  p_ij = (f(x_i, x_j) + 1 - f(x_j, x_i)) / 2
    (3)  win rate: r_i = mean of p_ij over the opponents j of i
    (4)  Bradley-Terry: r = argmax sum over pairs of p_ij log s(r_i - r_j) + p_ji log s(r_j - r_i)  - RIDGE/2 |r|^2,
         s the logistic function. The ridge keeps an undefeated sample's score finite; the maximum is unique, of mean 0
    (5)  opponents: all, or the m next ones around the circle, pairs (i, i + d mod G), d = 1..m: G m pairs, no more

(3) and (4) compare the samples of one prompt with one another: their means over a group are 1/2 and 0 for any model. So
watch a held-out reward beside them.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.tensors import Cond, map_cond
from rlfusion.rewards.base import RewardError

RIDGE = 1e-2
NEWTON = 60
GroupFunction = Callable[[Tensor, Cond], Tensor]
"""(samples (G, C, H, W) of one prompt, cond of batch G) -> (G,)."""
Comparison = Callable[[Tensor, Tensor, Cond], Tensor]
"""(a (N, C, H, W), b (N, C, H, W), cond of batch N) -> (N,) in [0, 1], the probability that a is better."""


class MayGroup(nn.Module):
    """A reward that says whether it needs whole groups."""

    @property
    @abstractmethod
    def groups(self) -> bool:
        """Whether all samples of a prompt must be scored together."""


class Grouped(MayGroup):
    """A reward of whole groups; it is called with any number of them."""

    @property
    def groups(self) -> bool:
        """As ``MayGroup.groups``."""
        return True

    @abstractmethod
    def within(self, samples: Tensor, cond: Cond) -> Tensor:
        """The values (G,) of one group."""

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W), of one or several whole groups in any order -> (B,)."""
        groups = rows_of_groups(cond, len(samples))
        values = [self._checked(samples[rows], map_cond(lambda c, r=rows: c[r], cond)) for rows in groups]
        return torch.cat(values)[torch.cat(groups).argsort()]

    def _checked(self, samples: Tensor, cond: Cond) -> Tensor:
        values = self.within(samples, cond)
        if not isinstance(values, Tensor) or values.shape != samples.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise RewardError(f"a group of {len(samples)} samples was answered {got}: expected ({len(samples)},)")
        return values


class GroupWise(Grouped):
    """Eq. (1). ``@GroupWise`` makes a reward of a function of all samples of a prompt; gradients pass."""

    def __init__(self, function: GroupFunction) -> None:
        super().__init__()
        self.function = function

    def within(self, samples: Tensor, cond: Cond) -> Tensor:
        """As ``Grouped.within``."""
        return self.function(samples, cond)


class PairWise(Grouped):
    """Eq. (2) to (5). ``@PairWise`` makes a reward of a comparison; gradients pass through win rates alone."""

    def __init__(
        self,
        compare: Comparison,
        scores: Literal["win_rate", "bradley_terry"] = "win_rate",
        opponents: int = 0,
        both: bool = False,
        batch: int = 256,
    ) -> None:
        """
        Args:
            compare: the comparison.
            scores: Eq. (3) or (4).
            opponents: m of Eq. (5); 0 for all.
            both: ask each pair both ways round.
            batch: pairs in one call of ``compare``.

        Raises:
            ConfigError: a setting that cannot work.
        """
        super().__init__()
        self.compare, self.scores, self.opponents, self.both, self.batch = compare, scores, opponents, both, batch
        if scores not in ("win_rate", "bradley_terry"):
            raise ConfigError(f"scores = {scores!r}: expected win_rate or bradley_terry")
        require_not_negative(self, "opponents")
        require_positive(self, "batch")

    def within(self, samples: Tensor, cond: Cond) -> Tensor:
        """As ``Grouped.within``.

        Raises:
            RewardError: a sample is alone in its group, or a comparison is no probability.
        """
        if len(samples) < 2:
            raise RewardError("a sample is alone with its prompt: a pairwise reward needs an opponent")
        first, second = pairs(len(samples), self.opponents)
        won = self._won(samples, cond, first, second)
        if self.scores == "bradley_terry":
            return bradley_terry(first, second, won.detach(), len(samples)).to(won.dtype)
        first, second = first.to(won.device), second.to(won.device)
        total = won.new_zeros(len(samples)).index_add(0, first, won).index_add(0, second, 1 - won)
        return total / torch.cat([first, second]).bincount(minlength=len(samples))

    def _won(self, samples: Tensor, cond: Cond, first: Tensor, second: Tensor) -> Tensor:
        """p_ij of the pairs, Eq. (2)."""
        parts = [self._half(samples, cond, i, j) for i, j in zip(first.split(self.batch), second.split(self.batch))]
        return torch.cat(parts)

    def _half(self, samples: Tensor, cond: Cond, i: Tensor, j: Tensor) -> Tensor:
        won = self._asked(samples, cond, i, j)
        return (won + 1 - self._asked(samples, cond, j, i)) / 2 if self.both else won

    def _asked(self, samples: Tensor, cond: Cond, i: Tensor, j: Tensor) -> Tensor:
        won = self.compare(samples[i], samples[j], map_cond(lambda c: c[i.to(c.device)], cond))
        if not isinstance(won, Tensor) or won.shape != i.shape:
            got = tuple(won.shape) if isinstance(won, Tensor) else type(won).__name__
            raise RewardError(f"{len(i)} comparisons were answered {got}: expected ({len(i)},)")
        won = won if won.is_floating_point() else won.float()
        if not bool(((won >= 0) & (won <= 1)).all()):
            raise RewardError(f"a comparison answered {won.min().item():g} to {won.max().item():g}: expected 0 to 1")
        return won


def rows_of_groups(cond: Cond, count: int) -> list[Tensor]:
    """The rows of each group of equal conditions, groups in the order of their first sample."""
    tables: list[Tensor] = []
    map_cond(lambda c: tables.append(c.detach().flatten(1) if c.ndim > 1 else c.detach()[:, None]) or c, cond)
    index = torch.zeros(count, 1, dtype=torch.int64)
    for table in tables:
        found = torch.unique(table, dim=0, return_inverse=True)[1].cpu()
        index = torch.cat([index, found[:, None]], 1)
    group = torch.unique(index, dim=0, return_inverse=True)[1].tolist()
    rows: dict[int, list[int]] = {}
    for row, g in enumerate(group):
        rows.setdefault(g, []).append(row)
    return [torch.tensor(found) for found in rows.values()]


def pairs(count: int, opponents: int = 0) -> tuple[Tensor, Tensor]:
    """Eq. (5): the first and the second of each pair, none twice."""
    most = (count - 1) // 2
    if opponents == 0 or opponents > most:
        return tuple(torch.triu_indices(count, count, 1))
    first = torch.arange(count).repeat(opponents)
    step = torch.arange(1, opponents + 1).repeat_interleave(count)
    return first, (first + step) % count


def bradley_terry(first: Tensor, second: Tensor, won: Tensor, count: int) -> Tensor:
    """Eq. (4) by Newton's method, (count,) float64; ``won`` is p_ij of the pairs (first, second)."""
    p, r = won.double().cpu(), torch.zeros(count, dtype=torch.float64)
    for _ in range(NEWTON):
        chance = torch.sigmoid(r[first] - r[second])
        slope = torch.zeros_like(r).index_add(0, first, p - chance).index_add(0, second, chance - p) - RIDGE * r
        weight = chance * (1 - chance)
        between = torch.zeros(count, count, dtype=torch.float64).index_put((first, second), weight, accumulate=True)
        between = between + between.T
        step = torch.linalg.solve(
            between.sum(1).diag() - between + RIDGE * torch.eye(count, dtype=torch.float64), slope
        )
        r = r + step / max(1.0, step.abs().max().item())  # no step above 1, so that it cannot leap past the maximum
        if step.abs().max() < 1e-12:
            break
    return (r - r.mean()).to(won.device)


def needs_groups(reward: object) -> bool:
    """Whether a reward is, or contains, one of whole groups."""
    inside = reward.modules() if isinstance(reward, nn.Module) else ()
    return any(module.groups for module in inside if isinstance(module, MayGroup))
