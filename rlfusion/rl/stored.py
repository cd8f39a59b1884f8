"""Stored samples in the place of those of a rollout: a learner of them takes no walks, and asks for no reward.

An update's samples are drawn epoch by epoch in an order that is keyed by the seed: a pure function of its number, so
that a run that is resumed goes on where it was. They are given as the ends of walks of the task's prompts.
"""

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.data.dataset import batch_indices
from rlfusion.rl.advantage import pair
from rlfusion.rollout import Task
from rlfusion.rollout.outside import Stored
from rlfusion.rollout.trajectory import Trajectory


class Shelf:
    """The stored samples of a task, ``rows`` of them."""

    def __init__(self, task: Task, data: str) -> None:
        """
        Raises:
            ConfigError: ``data`` cannot be opened.
        """
        self.task, self.held = task, task.outside.stored(data)

    def ends(self, rows: Tensor, score: Tensor, group: Tensor) -> Trajectory:
        """The samples ``rows`` (B,) as the ends of walks, with these rewards and groups (B,)."""
        x, prompt, conditions = self.held.x[rows], self.held.prompt[rows], self.task.conditions
        begin = torch.full((len(rows),), len(self.task.times) - 1)
        cond = None if conditions is None else conditions[prompt]
        walks = Trajectory(x[:, None], self.task.times, None, score.to(x.dtype), group, cond, 0, begin)
        return walks.to(self.task.device)


class Samples(Shelf):
    """Samples by themselves; of pairs those that were preferred."""

    def __init__(self, task: Task, data: str, count: int, seed: int) -> None:
        """``count`` of them are drawn for an update."""
        super().__init__(task, data)
        held, self.count, self.seed = self.held, count, seed
        if held.pairs and held.score is not None:
            kept = (held.score > 0).nonzero().flatten()
            self.held = Stored(held.x[kept], held.prompt[kept])

    def draw(self, iteration: int, weight: Tensor) -> Trajectory:
        """The samples of an update; their rewards are ``weight`` (N,)."""
        rows = torch.from_numpy(batch_indices(len(self.held.x), self.count, iteration, self.seed, "stored"))
        return self.ends(rows, weight[rows], self.held.prompt[rows])


class Pairs(Shelf):
    """Pairs of samples: those that were stored so, or in each prompt the best ``share`` by score with the worst."""

    def __init__(self, task: Task, data: str, share: float, count: int, seed: int) -> None:
        """``count`` of them are drawn for an update.

        Raises:
            ConfigError: ``data`` cannot be opened, or gives no pair.
        """
        super().__init__(task, data)
        self.count, self.seed = count, seed
        self.winner, self.loser = compared(self.held, data, share)

    def __len__(self) -> int:
        return len(self.winner)

    def draw(self, iteration: int) -> Trajectory:
        """The pairs of an update: walks 2 i and 2 i + 1 are one, of group i, with the rewards 1 and 0."""
        rows = torch.from_numpy(batch_indices(len(self), self.count, iteration, self.seed, "stored"))
        both = torch.stack([self.winner[rows], self.loser[rows]], 1).flatten()
        return self.ends(both, torch.tensor([1.0, 0.0]).repeat(len(rows)), torch.arange(len(both)) // 2)


def compared(held: Stored, data: str, share: float) -> tuple[Tensor, Tensor]:
    """(winner, loser) indices (P,) each of the pairs among stored samples, as ``Pairs`` has them.

    Raises:
        ConfigError: there is none.
    """
    if held.score is None:
        raise ConfigError(
            f"data = {data!r}: it holds no preferences or scores, expected columns such as jpg_0, jpg_1, label_0 "
            "and label_1, or score"
        )
    winner, loser = _of_rows(held.score) if held.pairs else pair(held.score, held.prompt, share)
    if not len(winner):
        raise ConfigError(
            f"data = {data!r}: it gives no pair, expected two images of one prompt whose scores differ, or a "
            "larger agent.pairs"
        )
    return winner, loser


def _of_rows(score: Tensor) -> tuple[Tensor, Tensor]:
    """(winner, loser) indices (P,) each of pairs 2 i and 2 i + 1, where their scores differ."""
    first, second = score[0::2], score[1::2]
    even = 2 * torch.arange(len(first))
    winner = even + (second > first)
    differ = first != second
    return winner[differ], (2 * even + 1 - winner)[differ]
