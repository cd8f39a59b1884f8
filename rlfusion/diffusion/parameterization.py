"""Kinds of prediction: every kind is one row (a, b) of

    (1)  y = a x_0 + b eps

and with Eq. (1) of ``schedule``, x_t = alpha x_0 + sigma eps, one 2x2 solve gives both unknowns for all kinds:

    (2)  x_0 = (b x_t - sigma y) / det,     eps = (alpha y - a x_t) / det,     det = alpha b - sigma a.

det says where a kind breaks: it is alpha for eps (pure noise), -sigma for x0 (clean data), 1 for v under a VP schedule.
Handbook 2.6; Salimans & Ho 2022 for v. A kind is named by text: "eps", or "EDM(sigma_data=0.5)" with settings.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.registry import Registry
from rlfusion.common.tensors import all_finite, cast
from rlfusion.diffusion.kinds import Kind, Plain, Solution, Timed
from rlfusion.diffusion.schedule import Level

PLAIN: Mapping[str, Plain] = {
    "x0": Plain(lambda l: (torch.ones_like(l.alpha), torch.zeros_like(l.alpha))),
    "eps": Plain(lambda l: (torch.zeros_like(l.alpha), torch.ones_like(l.alpha))),
    "score": Plain(lambda l: (torch.zeros_like(l.alpha), -1 / l.sigma)),
    "v": Plain(lambda l: (-l.sigma, l.alpha)),  # Salimans & Ho: alpha eps - sigma x0
    "v_handbook": Plain(lambda l: (l.sigma, -l.alpha)),  # handbook 2.6.2: the other sign
    "flow": Plain(lambda l: (l.d_alpha, l.d_sigma)),  # dx_t / dt along a fixed (x0, eps)
}

SCALED = ("InstaFlow", "TrigFlow", "EDM", "CM")

KINDS = Registry(
    "prediction kind",
    "rlfusion.kinds",
    {name: lambda kind=kind: kind for name, kind in PLAIN.items()}
    | {name: f"rlfusion.diffusion.kinds:{name}" for name in SCALED},
    Kind,
)


class Prediction(NamedTuple):
    """Both unknowns of Eq. (2), each shaped like x_t."""

    x0: Tensor
    eps: Tensor


def named(kind: str | Kind) -> Kind:
    """The kind that a text names; a ``Kind`` is itself.

    Raises:
        ConfigError: no such kind or setting, or a value that cannot work.
    """
    if not isinstance(kind, str):
        return kind
    return spec.parse(kind, KINDS, KINDS.what) if ":" in kind else _built_in(kind)  # a file may change


@lru_cache(maxsize=256)
def _built_in(kind: str) -> Kind:
    return spec.parse(kind, KINDS, KINDS.what)


def target(kind: str | Kind, x0: Tensor, eps: Tensor, l: Level) -> Tensor:
    """Eq. (1): what a network of this kind should answer for the pair (x0, eps), each (B, ...)."""
    of = named(kind)
    of = of.kind if isinstance(of, Timed) else of
    if of in (PLAIN["x0"], PLAIN["eps"]):  # 1 and 0 times the two
        return x0 if of == PLAIN["x0"] else eps
    a, b = of.row(l)
    return cast(a, x0) * x0 + cast(b, x0) * eps


def solve(kind: str | Kind, l: Level) -> Solution:
    """Eq. (2) at a level.

    Raises:
        ValueError: the kind does not determine (x0, eps) at this level (det = 0, or an infinite row).
    """
    solution = named(kind).solution(l)
    if l.alpha.device.type == "cpu" and not all(map(all_finite, solution)):
        raise ValueError(
            f"kind {kind!r} does not determine x0 and eps for alpha in {_range(l.alpha)}, sigma in {_range(l.sigma)}: "
            "use another kind or leave out that time"
        )
    return solution


def predict(solution: Solution, y: Tensor, x: Tensor) -> Prediction:
    """Eq. (2): a network's answer ``y`` at ``x`` = x_t as (x0, eps). The coefficients are cast here, last."""
    return predicted(Solution(*(cast(coefficient, x) for coefficient in solution)), y, x)


def predicted(c: Solution, y: Tensor, x: Tensor) -> Prediction:
    """The same of coefficients that are cast already."""
    return Prediction(c.x0_x * x + c.x0_y * y, c.eps_x * x + c.eps_y * y)


def convert(source: str | Kind, to: str | Kind, y: Tensor, x: Tensor, l: Level) -> Tensor:
    """Convert the answer ``y`` at ``x`` = x_t of a network of kind ``source`` to that of a network of kind ``to``.

    From "v_handbook" to InstaFlow() it is handbook 2.4.5, Eq. 39 corrected (erratum 49), with B = alpha + sigma:
    u = B v - x (sigma - alpha); back, v = (u + x (sigma - alpha)) / B.

    Raises:
        ValueError: ``source`` does not determine x0 and eps at this level.
    """
    p = predict(solve(source, l), y, x)
    return target(to, p.x0, p.eps, l)


def conditioning(kind: str | Kind, t: Tensor, l: Level) -> Tensor:
    """The network's time c_noise, float64.

    Raises:
        ValueError: the kind gives its network no finite time at ``t``.
    """
    time = named(kind).time(t, l)
    if time.device.type == "cpu" and not all_finite(time):
        raise ValueError(
            f"kind {kind!r} has no finite time input for alpha in {_range(l.alpha)}, sigma in {_range(l.sigma)}: "
            "use another kind or leave out that time"
        )
    return time


def _range(x: Tensor) -> str:
    return f"[{x.min().item():g}, {x.max().item():g}]"
