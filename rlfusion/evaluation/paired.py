"""Differences of pairs: samples from the same noise, or runs of the same seed."""

import torch
from torch import Tensor

EXACT = 12
"""Pairs up to which all signs are tried."""


def standard_error(values: Tensor) -> float:
    """That of the mean of some values (N,), N >= 2."""
    return (values.double().std() / len(values) ** 0.5).item()


def flips(difference: Tensor, draws: int, seed: int) -> float:
    """How often the mean of paired differences (N,) is as far from 0 under random signs, in (0, 1]: the test of N pairs
    that are alike, by all 2^N signs up to N = ``EXACT``, else by ``draws`` of them.
    """
    d = difference.double().cpu()
    if len(d) <= EXACT:
        signs = 1 - 2 * ((torch.arange(2 ** len(d))[:, None] >> torch.arange(len(d))) & 1).double()
        return _as_far(signs @ d, d.sum(), 0)
    generator = torch.Generator().manual_seed(seed)
    signs = 1 - 2 * torch.randint(0, 2, (draws, len(d)), generator=generator).double()
    return _as_far(signs @ d, d.sum(), 1)  # the signs that were met count, so that it is never 0


def _as_far(sums: Tensor, met: Tensor, own: int) -> float:
    tiny = 1e-12 * (1 + met.abs())
    return ((sums.abs() >= met.abs() - tiny).sum().item() + own) / (len(sums) + own)
