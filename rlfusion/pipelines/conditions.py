"""What a text-to-image network is conditioned on: the embeddings of prompts, computed once, looked up by number.

With P prompts the condition i < P is prompt i, and P + i its negative prompt. The embeddings live outside the network's
weights: copies of a policy share them, and they follow its inputs to their device.
"""

from typing import Self

import torch
from torch import Tensor

from rlfusion.errors import ConfigError

Rows = dict[str, Tensor]
"""The embeddings of some prompts by the family's own names, (B, ...) each."""


class Conditions:
    """A table of embeddings: of P prompts, then of their P negative ones (none of a family without guidance)."""

    def __init__(self, prompts: Rows, negatives: Rows | None) -> None:
        """Raises ConfigError for tables that do not fit each other."""
        if negatives is not None and {n: t.shape for n, t in prompts.items()} != {
            n: t.shape for n, t in negatives.items()
        }:
            raise ConfigError("embeddings of prompts and negative prompts differ in shape: expected the same for all")
        self.count = len(next(iter(prompts.values())))
        self.negated = negatives is not None
        self.table = {n: torch.cat([t, negatives[n]]) if negatives else t for n, t in prompts.items()}

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def __call__(self, index: Tensor, dtype: torch.dtype) -> Rows:
        """The embeddings of conditions (B,) int64, on their device; floats in ``dtype``."""
        if next(iter(self.table.values())).device != index.device:
            self.table = {name: tensor.to(index.device) for name, tensor in self.table.items()}
        rows = {name: tensor[index] for name, tensor in self.table.items()}
        return {name: row.to(dtype) if row.is_floating_point() else row for name, row in rows.items()}

    def null(self, index: Tensor) -> Tensor:
        """The conditions of the negative prompts of conditions (B,)."""
        if not self.negated:
            raise ConfigError("guidance: this model knows no negative prompts, expected guidance = 0")
        return index % self.count + self.count
