"""Copies of a nested state of tensors, in memory that is kept from one copy to the next."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from rlfusion.common import shards

Pairs = list[tuple[Tensor, Tensor]]
PLAIN = (str, int, float, bool, type(None))


def copied(state: Any, kept: Any = None) -> Any:
    """A copy of ``state`` that shares memory with nothing but ``kept``, an earlier copy, whose tensors it takes over
    where they are of the same place, shape, dtype and device; ``kept`` is not to be used any more.

    Dicts, lists, tuples and plain tensors are copied here, all else by ``copy.deepcopy``.
    """
    pairs: Pairs = []
    twin = _twin(state, kept, pairs)
    with torch.no_grad():
        _fill(pairs)
    return twin


def _twin(value: Any, kept: Any, pairs: Pairs) -> Any:
    """``value`` with other tensors in it, which ``pairs`` says how to fill."""
    kind = type(value)
    if kind is Tensor and not value.requires_grad and value.layout is torch.strided:
        twin = kept if type(kept) is Tensor and _fits(kept, value) else torch.empty_like(value)
        pairs.append((twin, value))
        return twin
    if kind in PLAIN:
        return value
    if kind in (dict, OrderedDict):
        twin, held = copy.copy(value), kept if isinstance(kept, dict) else {}
        for key, item in value.items():
            twin[key] = _twin(item, held.get(key), pairs)
        return twin
    if kind in (list, tuple):
        held = kept if isinstance(kept, list | tuple) else ()
        return kind(_twin(item, held[i] if i < len(held) else None, pairs) for i, item in enumerate(value))
    if not (shards.is_split(value) and not value.requires_grad):
        return copy.deepcopy(value)
    twin = kept if type(kept) is kind and _fits(kept, value) else torch.empty_like(value)
    pairs.append((shards.own(twin), shards.own(value)))
    return twin


def _fits(kept: Tensor, value: Tensor) -> bool:
    """Whether ``value`` can be copied into ``kept``, of its class, as an equal one of its kind."""
    return (
        kept is not value
        and kept.shape == value.shape
        and kept.dtype == value.dtype
        and kept.stride() == value.stride()
        and kept.device == value.device
    )


def _fill(pairs: Pairs) -> None:
    """Copy the second of each pair into the first, those of one device and dtype in one call."""
    groups: dict[tuple[torch.device, torch.dtype], Pairs] = {}
    for pair in pairs:
        groups.setdefault((pair[0].device, pair[0].dtype), []).append(pair)
    for group in groups.values():
        torch._foreach_copy_([twin for twin, _ in group], [value for _, value in group])
