"""Conditions of text-to-image networks: the embeddings of prompts, computed once, looked up by number.

With P prompts the condition i < P is prompt i, and P + i its negative prompt. The embeddings live outside the network's
weights: copies of a policy share them, and they follow its inputs to their device.
"""

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError

Rows = dict[str, Tensor]
"""The embeddings of some prompts by the family's own names, (B, ...) each."""


class Source(Protocol):
    """Where embeddings are kept that are not held in memory."""

    def take(self, at: Tensor) -> Rows:
        """The rows of these numbers (B,), on their device."""
        ...


class Conditions:
    """Embeddings of P prompts, then of their P negative ones (none of a family without guidance).

    Attributes:
        count: P.
        negated: whether there are negative ones.
        table: all rows by name, those of the negative prompts last; empty where they are kept elsewhere.
    """

    def __init__(
        self,
        prompts: Rows | Source,
        negatives: Rows | Source | None,
        at: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """``at`` are the row of each prompt, and of the negative one of each; as they stand, unless told.

        Raises:
            ConfigError: tables that do not fit each other.
        """
        self.table, self._sources, self.negated = {}, (), negatives is not None
        if isinstance(prompts, dict):
            others = negatives if isinstance(negatives, dict) else None
            self.table = prompts if others is None else _stacked(prompts, others)
            rows = len(next(iter(prompts.values())))
            at = at or (range(rows), range(rows))
        else:
            self._sources, rows = (prompts, negatives), 0
        self.count = len(at[0])
        self._at = torch.tensor([*at[0], *(rows + i for i in at[1])] if self.negated else list(at[0]))
        self._last: tuple[Tensor, Rows] | None = None

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def __call__(self, index: Tensor, dtype: torch.dtype) -> Rows:
        """The embeddings of conditions (B,) int64, on their device; floats in ``dtype``."""
        if self._at.device != index.device:
            self._at = self._at.to(index.device)
            self.table = {name: tensor.to(index.device) for name, tensor in self.table.items()}
        rows = self._kept(index) if self._sources else {n: t[self._at[index]] for n, t in self.table.items()}
        return {name: row.to(dtype) if row.is_floating_point() else row for name, row in rows.items()}

    def _kept(self, index: Tensor) -> Rows:
        """Rows that are kept elsewhere; the steps of a walk ask for the same ones again."""
        if self._last is not None and torch.equal(self._last[0], index):
            return self._last[1]
        rows, negative = {}, index >= self.count
        for source, mine in zip(self._sources, (~negative, negative)):
            if bool(mine.any()):
                for name, some in source.take(self._at[index[mine]]).items():
                    rows.setdefault(name, some.new_empty(len(index), *some.shape[1:]))[mine] = some
        self._last = index.clone(), rows
        return rows

    def null(self, index: Tensor) -> Tensor:
        """The conditions of the negative prompts of conditions (B,)."""
        if not self.negated:
            raise ConfigError("guidance: this model knows no negative prompts, expected guidance = 0")
        return index % self.count + self.count


def _stacked(prompts: Rows, negatives: Rows) -> Rows:
    if {n: t.shape[1:] for n, t in prompts.items()} != {n: t.shape[1:] for n, t in negatives.items()}:
        raise ConfigError("embeddings of prompts and negative prompts differ in shape: expected the same for all")
    return {name: torch.cat([tensor, negatives[name]]) for name, tensor in prompts.items()}
