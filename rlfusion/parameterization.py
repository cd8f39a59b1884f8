"""What a network predicts: every kind is one row (a, b) of

    (1)  y = a x_0 + b eps

and with Eq. (1) of ``schedule``, x_t = alpha x_0 + sigma eps, one 2x2 solve gives both unknowns for all kinds:

    (2)  x_0 = (b x_t - sigma y) / det,     eps = (alpha y - a x_t) / det,     det = alpha b - sigma a.

det says where a kind breaks: it is alpha for eps (pure noise), -sigma for x0 (clean data), 1 for v under a VP schedule.
Handbook 2.6; Salimans & Ho 2022 for v.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.errors import unknown
from rlfusion.schedule import Level
from rlfusion.tensors import cast

Row = Callable[[Level], tuple[Tensor, Tensor]]

KINDS: Mapping[str, Row] = {
    "x0": lambda l: (torch.ones_like(l.alpha), torch.zeros_like(l.alpha)),
    "eps": lambda l: (torch.zeros_like(l.alpha), torch.ones_like(l.alpha)),
    "score": lambda l: (torch.zeros_like(l.alpha), -1 / l.sigma),
    "v": lambda l: (-l.sigma, l.alpha),  # Salimans & Ho: alpha eps - sigma x0
    "flow": lambda l: (l.d_alpha, l.d_sigma),  # dx_t / dt along a fixed (x0, eps)
}


class Prediction(NamedTuple):
    """Both unknowns of Eq. (2), each shaped like x_t."""

    x0: Tensor
    eps: Tensor


def row(kind: str) -> Row:
    """The row of a kind by name.

    Raises:
        ConfigError: no such kind.
    """
    if kind not in KINDS:
        raise unknown("prediction kind", kind, KINDS)
    return KINDS[kind]


def target(kind: str, x0: Tensor, eps: Tensor, l: Level) -> Tensor:
    """Eq. (1): what a network of this kind should answer for the pair (x0, eps), each (B, ...)."""
    a, b = row(kind)(l)
    return cast(a, x0) * x0 + cast(b, x0) * eps


class Solution(NamedTuple):
    """The coefficients of Eq. (2), float64: x0 = x0_x x_t + x0_y y, eps = eps_x x_t + eps_y y."""

    x0_x: Tensor
    x0_y: Tensor
    eps_x: Tensor
    eps_y: Tensor


def solve(kind: str, l: Level) -> Solution:
    """Eq. (2) at a level.

    Raises:
        ValueError: the kind does not determine (x0, eps) at this level (det = 0, or an infinite row).
    """
    a, b = row(kind)(l)
    det = l.alpha * b - l.sigma * a
    if det.device.type == "cpu" and not bool((det.isfinite() & (det != 0)).all()):
        raise ValueError(
            f"kind {kind!r} does not determine x0 and eps for alpha in {_range(l.alpha)}, sigma in {_range(l.sigma)}: "
            "use another kind or leave out that time"
        )
    return Solution(b / det, -l.sigma / det, -a / det, l.alpha / det)


def predict(solution: Solution, y: Tensor, x: Tensor) -> Prediction:
    """Eq. (2): a network's answer ``y`` at ``x`` = x_t as (x0, eps). The coefficients are cast here, last."""
    c = Solution(*(cast(coefficient, x) for coefficient in solution))
    return Prediction(c.x0_x * x + c.x0_y * y, c.eps_x * x + c.eps_y * y)


def _range(x: Tensor) -> str:
    return f"[{x.min().item():g}, {x.max().item():g}]"
