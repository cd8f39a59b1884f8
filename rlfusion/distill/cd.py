"""Consistency distillation (Song et al. 2023, Alg. 2; handbook 2.3.1, 3.2.6, Eq. 20-22, 46 corrected).

The student becomes the consistency function of the teacher's ODE, by Eq. (1) of ``distill.consistency`` with

    (1)  x_s from x_t = x_{t_{n+m}} by m steps of the teacher over the grid, DDIM or Heun    (erratum 28)

At the exact f the loss is 0 but for the error of the teacher's steps. Regressing on x0 in the place of f_-(x_s, s)
would give the mean of the data, not f (erratum 75).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers
from rlfusion.distill.base import Distiller, Settings, Teaching
from rlfusion.distill.consistency import Consistency, Move, bounded, check_grid, constant, metric_of
from rlfusion.distill.ode import Solver, along
from rlfusion.models import Card
from rlfusion.pretrain import Draw


def by_teacher(teacher: nn.Module, solver: Solver) -> Move:
    """Eq. (1)."""

    def move(draw: Draw, x: Tensor, times: list[Tensor]) -> Tensor:
        return along(teacher, x, times, draw.cond, solver)

    return move


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
    lr: float = 3e-4
    intervals: int = 20
    span: int = 1
    solver: Solver = "ddim"
    metric: str = "L2()"
    mu: float = 0.95
    boundary: str = "LCM()"

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="Renoise()")
    ANSWERS: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.span <= self.intervals:
            raise ConfigError(f"span = {self.span}, intervals = {self.intervals}: expected 1 <= span <= intervals")
        if not 0 <= self.mu < 1:
            raise ConfigError(f"mu = {self.mu}: expected 0 <= mu < 1")
        metric_of(self.metric)  # refuses what no table holds

    def card(self, student: Card) -> Card:
        return bounded(student, self.boundary)

    def check(self, teaching: Teaching) -> None:
        metric_of(self.metric).check(teaching.student.space)
        check_grid(self.intervals, teaching.student, teaching.teacher)

    def learner(self, teaching: Teaching) -> Distiller:
        move, stops = by_teacher(teaching.teacher, self.solver), tuple(range(self.span, -1, -1))
        loss = Consistency(move, stops, *constant(self.intervals, self.mu), metric_of(self.metric))
        return self.fit(teaching, loss, self.steps, self.name)
