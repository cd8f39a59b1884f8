"""Rewards that are asked for once, where all ranks have drawn the same samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlfusion.common import shards
from rlfusion.training.ranks import current


def asked(ask: Callable[[], Tensor]) -> Tensor:
    """The values that ``ask`` gives the first rank, on every rank, where all have drawn the same samples, as they do
    while their network is split. Elsewhere what it gives this process.
    """
    if current().count == 1 or not shards.active():
        return ask()
    kind, values = current().by_first(lambda: _listed(ask()))
    return torch.tensor(values, dtype=getattr(torch, kind))


def _listed(value: Tensor) -> tuple[str, list[float]]:
    return str(value.dtype).removeprefix("torch."), value.tolist()
