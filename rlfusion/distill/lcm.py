"""Latent consistency distillation (Luo et al. 2023; handbook 2.3.2, 3.2.6, Eq. 24, 46 corrected).

Eq. (1) of ``distill.consistency`` on every k-th of T times, with the boundary of LCM around the student, and

    (1)  x_s from x_t by ONE step of the teacher's DDIM, over k = ``skip`` times
    (2)  with guidance (1 + w) y_c - w y_0, w ~ U[w_low, w_high], which the student reads         (errata 32, 74)

Guidance is the teacher's alone: one call a step gives the student's samples at any w in the range (``chain.guidance``).
T is the table's, 1000 in continuous time. The grid begins at the first time, where f = x, as the released code's does:
with t at any of the T times, as the paper writes, f_- at the k - 1 times above the first is asked and never taught (on
digits the Frechet distance was then 85 at four steps). The paper: k = 20, w in [2, 14], pseudo-Huber with c = 0.001,
mu = 0.95.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.consistency import RESOLUTION
from rlfusion.diffusion.denoiser import Answers
from rlfusion.distill.base import Distiller, Settings, Teaching
from rlfusion.distill.cd import by_teacher
from rlfusion.distill.consistency import Consistency, check_grid, constant, metric_of
from rlfusion.distill.guidance import AnyGuidance, Weighted, check_range, check_unguided
from rlfusion.models import Card


@dataclass(frozen=True)
class Config(Settings):
    """Settings of latent consistency distillation.

    Attributes:
        name: the method.
        skip: k, the times that the teacher's one step crosses; a divisor of T.
        w_low: the least guidance weight.
        w_high: the greatest.
        metric: d: L2(), PseudoHuber(c=...) or LPIPS(net=..., weights=..., size=...).
        mu: decay of f_-, the average of the student that the target is of; 0 for the student itself.
        boundary: LCM(sigma_data=..., scaling=...), put around the student.
    """

    name: Literal["lcm"] = "lcm"
    steps: int = 5000
    lr: float = 8e-4
    skip: int = 50
    w_low: float = 0.0
    w_high: float = 2.0
    metric: str = "L2()"
    mu: float = 0.95
    boundary: str = "LCM()"

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="Renoise()")
    ANSWERS: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.w_low, self.w_high)
        if not self.skip >= 1:
            raise ConfigError(f"skip = {self.skip}: expected at least 1")
        if not 0 <= self.mu < 1:
            raise ConfigError(f"mu = {self.mu}: expected 0 <= mu < 1")
        metric_of(self.metric)  # refuses what no table holds

    def card(self, student: Card) -> Card:
        return replace(student, boundary=self.boundary, weights=(self.w_low, self.w_high))

    def check(self, teaching: Teaching) -> None:
        check_unguided(teaching, self.name)
        metric_of(self.metric).check(teaching.student.space)
        times = teaching.student.schedule.resolution or RESOLUTION
        if times % self.skip or self.skip == times:
            raise ConfigError(f"skip = {self.skip}: expected a divisor of the {times} times, and fewer")
        check_grid(self.intervals(teaching), teaching.student, teaching.teacher)

    def intervals(self, teaching: Teaching) -> int:
        """T / k."""
        return (teaching.student.schedule.resolution or RESOLUTION) // self.skip

    def learner(self, teaching: Teaching) -> Distiller:
        move = by_teacher(AnyGuidance(teaching.unguided, teaching.null), "ddim")
        grid = constant(self.intervals(teaching), self.mu)
        loss = Consistency(move, (1, 0), *grid, metric_of(self.metric))
        return self.fit(teaching, Weighted(loss, self.w_low, self.w_high), self.steps, self.name)
