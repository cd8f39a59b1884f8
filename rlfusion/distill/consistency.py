"""Common part of the discrete-time consistency methods: grid, boundary, one loss (handbook 2.3.1, Eq. 20, 25).

A student is a consistency function f: each point of a trajectory goes to its end, f(x, t_0) = x. On a grid t_0 < .. <
t_N = 1, even in time (rounded to the times of a table),

    (1)  L = E d( f_theta(x_t, t), f_-(x_s, s) ),   x_t = alpha x0 + sigma eps,   t = t_{n+k},  s = t_n,  n uniform
    (2)  x_s: where a method moves x_t to, without gradient

f_- is the student itself without gradient, or its average with a decay; it is never the teacher (erratum 73). A student
whose kind is no consistency function by itself (x0, eps) gets the boundary of LCM around it, and t_0 = 1 / T; else
t_0 = 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlfusion import models
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Denoiser, require_readable
from rlfusion.diffusion.schedule import Schedule, diffused, level
from rlfusion.distill.on_schedule import on_its_own
from rlfusion.models import Card
from rlfusion.pretrain import Draw, Loss
from rlfusion.pretrain.consistency import Pair, check_boundary, discrepancy
from rlfusion.pretrain.metrics import METRICS, Metric

Move = Callable[[Draw, Tensor, Sequence[Tensor]], Tensor]
"""Eq. (2): (draw, x_t (B, *), the falling times from t to s, each (B,) float64) -> x_s."""


def metric_of(text: str) -> Metric:
    """The distance that a text writes."""
    return spec.parse(text, METRICS, "metric")


def grid_time(n: Tensor, intervals: int, start: float, schedule: Schedule) -> Tensor:
    """t_n (B,) float64 of a grid of N = ``intervals`` from t_0 = ``start``."""
    t = start + (1 - start) * n.double() / intervals
    return t if schedule.resolution is None else (t * schedule.resolution).round() / schedule.resolution


def first_time(student: nn.Module) -> float:
    """t_0, where f(x, t_0) = x."""
    return student.start if isinstance(student, LCM) else 0.0


def bounded(student: Card, boundary: str) -> Card:
    """``student``, with the boundary around it where it is no consistency function by itself."""
    try:
        plain = replace(student.config, net="ResidualMLP(width=8, depth=1)")  # no network decides it
        check_boundary(models.build(replace(student, config=plain, boundary="")))
    except ConfigError:
        return replace(student, boundary=student.boundary or boundary)
    return student


def check_grid(intervals: int, student: nn.Module, teacher: nn.Module | None = None) -> None:
    """Raise ConfigError where a table has too few times for so many intervals, or the student, or the teacher that is
    asked, has no answer at pure noise, where the grid ends.
    """
    schedule, end = student.schedule, torch.ones(1, dtype=torch.float64)
    if schedule.resolution is not None and intervals >= schedule.resolution:
        raise ConfigError(f"intervals = {intervals}: expected fewer than the {schedule.resolution} times of {schedule}")
    for model in (student, *([] if teacher is None else [on_its_own(teacher)])):
        require_readable(model, end)


@dataclass(frozen=True)
class Consistency(Loss):
    """Eq. (1).

    Attributes:
        move: Eq. (2).
        stops: the way from t to s in intervals above t_n: (m, .., 1, 0), or (k, 0) for one jump.
        intervals: N at a step of a total.
        decay: of f_- at a step of a total; None for the student itself.
        metric: d.
    """

    move: Move
    stops: tuple[int, ...]
    intervals: Callable[[int, int], int]
    decay: Callable[[int, int], float | None]
    metric: Metric

    def teacher_decay(self, step: int, total: int) -> float | None:
        return self.decay(step, total)

    def pair(self, denoiser: Denoiser, draw: Draw) -> Pair:
        """The two points of Eq. (1)."""
        intervals, schedule = self.intervals(draw.step, draw.total), denoiser.schedule
        last = intervals - self.stops[0]
        n = (draw.u * (last + 1)).floor().clamp(max=last)
        times = [grid_time(n + k, intervals, first_time(denoiser), schedule) for k in self.stops]
        x_t = diffused(draw.x0, draw.eps, level(schedule, times[0], draw.x0))
        return Pair(x_t, times[0], self.move(draw, x_t, times), times[-1])

    def __call__(self, denoiser: Denoiser, target: Denoiser, draw: Draw) -> Tensor:
        return discrepancy(denoiser, target, self.pair(denoiser, draw), draw.cond, self.metric)


def constant(intervals: int, mu: float) -> tuple[Callable[[int, int], int], Callable[[int, int], float | None]]:
    """A grid and a decay that stay as they are; mu = 0 is the student itself."""
    return (lambda step, total: intervals), (lambda step, total: mu or None)
