"""Rows of tensors brought from the ranks that have them to those that want them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


def parts_of(orders: list[Tensor], steps: int) -> Iterator[list[Tensor]]:
    """The walks of each share in ``steps`` parts; what is left over is dealt on from where the share before ended."""
    at = 0
    for order in orders:
        parts = order.tensor_split(steps)
        yield [parts[(i - at) % steps] for i in range(steps)]
        at += len(order)


def deal(rank: int, rows: Tensor, at: Sequence[Tensor], to: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The rows ``to[rank]``, of ``rows`` on the CPU that are ``at[rank]`` here, and the bytes that came from others."""
    whose = torch.empty(sum(map(len, at)), dtype=torch.int64)
    place = torch.empty_like(whose)
    for other, own in enumerate(at):
        whose[own], place[own] = other, torch.arange(len(own))
    mine = to[rank]
    found, arriving = rows.new_empty(len(mine), *rows.shape[1:]), []
    calls: list[Any] = []
    for other, wanted in enumerate(to):
        sent = rows[place[wanted[whose[wanted] == rank]]]
        theirs = (whose[mine] == other).nonzero().flatten()
        if other == rank:
            found[theirs] = sent
            continue
        if len(sent):
            calls.append(torch.distributed.isend(sent.flatten().view(torch.uint8), other))
        if len(theirs):
            buffer = torch.empty(len(theirs) * math.prod(rows.shape[1:]) * rows.element_size(), dtype=torch.uint8)
            arriving.append((theirs, buffer))
            calls.append(torch.distributed.irecv(buffer, other))
    for call in calls:
        call.wait()
    for theirs, buffer in arriving:
        found[theirs] = buffer.view(rows.dtype).view(len(theirs), *rows.shape[1:])
    return found, sum(len(buffer) for _, buffer in arriving)


class Shelf(Protocol):
    """Where the first rank says to the others what lies in a store that all of them reach."""

    def put(self, number: int, places: list[tuple[str, Any]]) -> None:
        """The first rank's: the places ``number``, each with a SHA-256; those before are forgotten."""

    def get(self, number: int) -> list[tuple[str, Any]]:
        """What was put there."""

    def fetch(self, place: Any) -> np.ndarray:
        """What lies at a place, to be read alone."""
