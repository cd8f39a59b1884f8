"""Consistency distillation (Song et al. 2023, Alg. 2; handbook 2.3.1, 3.2.6, Eq. 20-22, 46 corrected).

The student is a consistency function f: each point of a trajectory of the teacher's ODE goes to its end, f(x, t_0) = x.
On the grid t_0 < .. < t_N, even in time (rounded to the times of a table),

    (1)  L = E d( f_theta(x_{n+m}, t_{n+m}), f_-(x^_n, t_n) ),   x_{n+m} = alpha x0 + sigma eps,  n uniform
    (2)  x^_n from x_{n+m} by m steps of the teacher, DDIM or Heun, without gradient       (erratum 28)

f_- is the student itself without gradient (mu = 0), or its average with decay mu; it is not the teacher (erratum 73).
A student whose kind is no consistency function by itself (x0, eps) gets the boundary of LCM around it, and t_0 = 1 / T;
else t_0 = 0. At the exact f the loss is not 0 but for exact steps; regressing on x0 instead would give the mean of the
data, not f (erratum 75).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from rlfusion import models, spec
from rlfusion.chain import Chain
from rlfusion.consistency import LCM
from rlfusion.denoiser import Denoiser
from rlfusion.distill.base import Distiller, Settings, Teaching
from rlfusion.distill.ode import Solver, along
from rlfusion.errors import ConfigError
from rlfusion.models import Card
from rlfusion.pretrain import Draw, Loss
from rlfusion.pretrain.consistency import Pair, check_boundary, discrepancy
from rlfusion.pretrain.metrics import METRICS, Metric
from rlfusion.schedule import Schedule, diffused, level


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
        check_boundary(models.build(student))
    except ConfigError:
        return replace(student, boundary=student.boundary or boundary)
    return student


@dataclass(frozen=True)
class Consistency(Loss):
    """Eq. (1) with the teacher's steps of Eq. (2)."""

    teacher: nn.Module
    intervals: int
    span: int
    solver: Solver
    metric: Metric
    mu: float

    def teacher_decay(self, step: int, total: int) -> float | None:
        return self.mu or None

    def pair(self, denoiser: Denoiser, draw: Draw) -> Pair:
        """The two points of Eq. (1)."""
        n = (draw.u * (self.intervals - self.span + 1)).floor().clamp(max=self.intervals - self.span)
        schedule, start = denoiser.schedule, first_time(denoiser)
        times = [grid_time(n + k, self.intervals, start, schedule) for k in range(self.span, -1, -1)]
        x_t = diffused(draw.x0, draw.eps, level(schedule, times[0], draw.x0))
        return Pair(x_t, times[0], along(self.teacher, x_t, times, draw.cond, self.solver), times[-1])

    def __call__(self, denoiser: Denoiser, target: Denoiser, draw: Draw) -> Tensor:
        return discrepancy(denoiser, target, self.pair(denoiser, draw), draw.cond, self.metric)


@dataclass(frozen=True)
class Config(Settings):
    """Settings of consistency distillation.

    Attributes:
        name: the method.
        intervals: N of the grid.
        span: m, the teacher's steps between the two points.
        solver: the teacher's step: "ddim" (one call) or "heun" (two).
        metric: d: L2(), PseudoHuber(c=...) or LPIPS(net=..., weights=..., size=...).
        mu: decay of f_-, the average of the student that the target is of; 0 for the student itself.
        boundary: LCM(sigma_data=..., scaling=...), put around a student that is no consistency function by itself.
    """

    name: Literal["cd"] = "cd"
    intervals: int = 40
    span: int = 1
    solver: Solver = "ddim"
    metric: str = "PseudoHuber(c=0.03)"
    mu: float = 0.0
    boundary: str = "LCM()"

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="Renoise()")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.span <= self.intervals:
            raise ConfigError(f"span = {self.span}, intervals = {self.intervals}: expected 1 <= span <= intervals")
        if not 0 <= self.mu < 1:
            raise ConfigError(f"mu = {self.mu}: expected 0 <= mu < 1")
        _ = self._metric  # refuses what no table holds

    @property
    def _metric(self) -> Metric:
        return spec.parse(self.metric, METRICS, "metric")

    def card(self, student: Card) -> Card:
        return bounded(student, self.boundary)

    def check(self, teaching: Teaching) -> None:
        self._metric.check(teaching.student.space)
        resolution = teaching.student.schedule.resolution
        if resolution is not None and self.intervals >= resolution:
            raise ConfigError(f"intervals = {self.intervals}: expected fewer than the schedule's {resolution} times")

    def learner(self, teaching: Teaching) -> Distiller:
        loss = Consistency(teaching.teacher, self.intervals, self.span, self.solver, self._metric, self.mu)
        return self.fit(teaching, loss, self.steps, self.name)
