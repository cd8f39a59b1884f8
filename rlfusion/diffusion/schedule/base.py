"""The meaning of a time: the protocol of schedules, and the one place where a time broadcasts.

    (1)  x_t = alpha(t) x_0 + sigma(t) eps,     eps ~ N(0, I),     t = 0 is data and t = 1 is noise.

Times are float64 tensors on the CPU: the coefficients of every step are made there, in float64, and cast last (see
``tensors.cast``). A time is a scalar () shared by the batch, or (B,).
"""

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlfusion.common.tensors import cast
from rlfusion.diffusion import rows


class Level(NamedTuple):
    """The values of a schedule at one time: alpha, sigma of Eq. (1) and their derivatives in t, float64."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Schedule(Protocol):
    """A frozen dataclass that maps times in [0, 1], any shape, to a ``Level`` of that shape."""

    @property
    def resolution(self) -> int | None:
        """The number T of discrete times k / T that exist, or None for continuous time."""

    def __call__(self, t: Tensor) -> Level: ...

    def __hash__(self) -> int: ...


def level(schedule: Schedule, t: Tensor, like: Tensor) -> Level:
    """The level at ``t`` () or (B,), shaped to act on ``like`` (B, ...): the one place where a time broadcasts.

    Raises:
        ValueError: a time outside [0, 1], or of a shape that is neither () nor (B,).
    """
    if t.ndim == 0:
        return _at(schedule, t.item())
    # a copy of t: what is kept for t must hold no view of it, and a flow's sigma is one
    return rows.kept(t, (schedule, len(like), like.ndim), lambda: _of_rows(schedule, t.clone(), like))


def _of_rows(schedule: Schedule, t: Tensor, like: Tensor) -> Level:
    """The level of the times (B,) of rows."""
    t = t.double()
    if t.ndim == 1 and len(t) in (1, len(like)):
        t = t.reshape(-1, *[1] * (like.ndim - 1))
    else:
        raise ValueError(f"times are () or (B,): got {tuple(t.shape)} for a batch {tuple(like.shape)}")
    if t.device.type == "cpu" and not torch.equal(t, t.clamp(0, 1)):
        raise ValueError(f"times lie in [0, 1]: got {t.min().item():g} to {t.max().item():g}")
    return schedule(t)


def diffused(x0: Tensor, eps: Tensor, l: Level) -> Tensor:
    """Eq. (1) of x0 and eps (B, ...) at a level shaped to act on them."""
    return cast(l.alpha, x0) * x0 + cast(l.sigma, x0) * eps


@lru_cache(maxsize=4096)
def _at(schedule: Schedule, t: float) -> Level:
    """The level of a time that a whole batch shares: the same few in every rollout."""
    if not 0 <= t <= 1:
        raise ValueError(f"times lie in [0, 1]: got {t:g}")
    return schedule(torch.tensor(t, dtype=torch.float64))


def time_of(schedule: Schedule, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The times (B,) float64 at which sigma / alpha, which rises with t on every schedule, is that of ``alpha`` and
    ``sigma`` (B,), by bisection. Ratios beyond the schedule's own become its ends.
    """
    low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
    for _ in range(50):
        mid = (low + high) / 2
        l = schedule(mid)
        below = l.sigma * alpha < sigma * l.alpha
        low, high = torch.where(below, mid, low), torch.where(below, high, mid)
    return (low + high) / 2
