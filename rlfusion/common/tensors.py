"""Small tensor helpers that every other module may use."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Cond = Any
"""A condition: ``None``, a tensor (B, ...), or a dict of such tensors."""


def map_cond(fn: Callable[[Tensor], Tensor], cond: Cond) -> Cond:
    """Apply ``fn`` to every tensor of a condition.

    Raises:
        TypeError: the condition is neither None, a tensor, nor a dict of conditions.
    """
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return fn(cond)
    if isinstance(cond, dict):
        return {key: map_cond(fn, value) for key, value in cond.items()}
    raise TypeError(f"a condition is None, a tensor or a dict of tensors, not {type(cond).__name__}")


def cat_cond(conds: list[Cond]) -> Cond:
    """Concatenate conditions of one structure along the batch."""
    first = conds[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: cat_cond([c[key] for c in conds]) for key in first}
    return torch.cat(conds)


def sum_features(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): the sum over everything but the batch."""
    return x.flatten(1).sum(1)


def mean_features(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean over everything but the batch."""
    return x.flatten(1).mean(1)


def all_finite(x: Tensor) -> bool:
    """Whether all numbers of ``x`` are finite: then their sum is, unless it overflows. One wait for a GPU."""
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())


def grey(x: Tensor, channels: int) -> Tensor:
    """Images (B, 3, ...) for a model of so many channels: one channel (B, 1, ...) where it has one and all three are
    equal, as grey pictures of files are; else as they are.
    """
    return x[:, :1].contiguous() if channels == 1 and x.shape[1] == 3 and bool((x == x[:, :1]).all()) else x


def cast(coefficient: Tensor, like: Tensor) -> Tensor:
    """A float64 coefficient, made on the CPU, in the dtype and on the device of ``like``, without a device sync; itself
    where it is there already.
    """
    if coefficient.dtype == like.dtype and coefficient.device == like.device:
        return coefficient
    if coefficient.ndim == 0 and like.device.type != "cpu":
        return torch.full((), coefficient.item(), dtype=like.dtype, device=like.device)
    return coefficient.to(device=like.device, dtype=like.dtype, non_blocking=True)


PINNED = ("cuda",)
"""Devices that copy from page-locked memory of the CPU while it goes on; from any other memory it may have to wait."""


def staged(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on another device; where it comes from the CPU to a GPU, the CPU does not wait for what the GPU is at."""
    if x.device == device:
        return x
    if x.device.type == "cpu" and torch.device(device).type in PINNED:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def moved(index: Tensor, device: torch.device) -> Tensor:
    """Numbers of rows on another device, for which the CPU does not wait."""
    return index.to(device, non_blocking=True)


def to_pixels(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]: how a pixel-space latent becomes an image. Values outside are the image's black and white."""
    return ((x + 1) / 2).clamp(0, 1)
