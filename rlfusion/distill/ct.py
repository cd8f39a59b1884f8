"""Consistency training as distillation (Song et al. 2023, Alg. 3; handbook 2.3.1, Eq. 25): the teacher gives the
weights that the student begins with, the data the pairs.

Eq. (1) of ``distill.consistency`` with neighbours of the grid and

    (1)  x_s = alpha_s x0 + sigma_s eps, of the same x0 and the same eps as x_t                          (erratum 33)

and N(k), mu(k) of ``pretrain.consistency``. In the limit of fine steps the gradient that a fixed f_- leaves is that of
distillation by an exact teacher; the losses differ (erratum 34).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers
from rlfusion.diffusion.schedule import Schedule, diffused, level
from rlfusion.distill.base import Distiller, Settings, Teaching
from rlfusion.distill.consistency import Consistency, Move, bounded, check_grid, metric_of
from rlfusion.models import Card
from rlfusion.pretrain import Draw
from rlfusion.pretrain.consistency import decay, points


def by_data(schedule: Schedule) -> Move:
    """Eq. (1)."""

    def move(draw: Draw, x: Tensor, times: list[Tensor]) -> Tensor:
        return diffused(draw.x0, draw.eps, level(schedule, times[-1], draw.x0))

    return move


@dataclass(frozen=True)
class Config(Settings):
    """Settings of consistency training from a teacher's weights.

    Attributes:
        name: the method.
        s0: points of the grid at the first step, at least 2.
        s1: intervals of the grid at the last.
        mu0: decay of f_- at the first step; 0 for the student itself throughout.
        metric: d: L2(), PseudoHuber(c=...) or LPIPS(net=..., weights=..., size=...).
        boundary: LCM(sigma_data=..., scaling=...), put around a student that is no consistency function by itself.
    """

    name: Literal["ct"] = "ct"
    steps: int = 8000
    lr: float = 8e-4
    s0: int = 10
    s1: int = 40
    mu0: float = 0.95
    metric: str = "L2()"
    boundary: str = "LCM()"

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="Renoise()")
    ASKS: ClassVar[bool] = False
    ANSWERS: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.s0 <= self.s1:
            raise ConfigError(f"s0 = {self.s0}, s1 = {self.s1}: expected 2 <= s0 <= s1")
        if not 0 <= self.mu0 < 1:
            raise ConfigError(f"mu0 = {self.mu0}: expected 0 <= mu0 < 1")
        metric_of(self.metric)  # refuses what no table holds

    def card(self, student: Card) -> Card:
        return bounded(student, self.boundary)

    def check(self, teaching: Teaching) -> None:
        metric_of(self.metric).check(teaching.student.space)
        check_grid(self.s1, teaching.student)
        if teaching.guidance:
            raise ConfigError("guidance: ct asks the teacher nothing, expected 0")

    def learner(self, teaching: Teaching) -> Distiller:
        move = by_data(teaching.student.schedule)
        loss = Consistency(move, (1, 0), self.intervals, self.decay, metric_of(self.metric))
        return self.fit(teaching, loss, self.steps, self.name)

    def intervals(self, step: int, total: int) -> int:
        """N(k) - 1."""
        return points(step, total, self.s0, self.s1) - 1

    def decay(self, step: int, total: int) -> float | None:
        """mu(k)."""
        return decay(self.intervals(step, total) + 1, self.s0, self.mu0) if self.mu0 else None
