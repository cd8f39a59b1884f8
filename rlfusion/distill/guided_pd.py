"""Guided distillation (Meng et al. 2023, section 3.1, 3.2; handbook 3.2.1): the guidance first, then the steps.

    (1)  stage 1:  one student that reads w learns the teacher's guided answer,
         L = E w_t |x0_hat_guided(x_t, w) - x0_hat(x_t, w)|^2,   w ~ U[w_low, w_high]
    (2)  stage 2:  progressive distillation (``pd``) of that student, w drawn for each sample

The student of any number of steps then has its guidance in one call a step, at any w of the range (``chain.guidance``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rlfusion.common.errors import require_positive
from rlfusion.distill.base import Distiller, Teaching
from rlfusion.distill.guidance import AnyGuidance, Weighted, check_range, check_unguided
from rlfusion.distill.pd import Rounds, halvings
from rlfusion.distill.stages import Stage, Staged, local_steps
from rlfusion.distill.student import Match
from rlfusion.models import Card
from rlfusion.pretrain import Loss, LossLearner


@dataclass(frozen=True)
class Config(Rounds):
    """Settings of guided progressive distillation. ``steps`` are those of each round.

    Attributes:
        name: the method.
        start: steps of the teacher's chain in the first round, 2^M times those of ``chain``.
        weight: of both stages, TruncatedSNR() or SNRPlusOne().
        w_low: the least guidance weight.
        w_high: the greatest.
        first: updates of stage 1.
    """

    name: Literal["guided_pd"] = "guided_pd"
    steps: int = 1000
    w_low: float = 0.0
    w_high: float = 2.0
    first: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.w_low, self.w_high)
        require_positive(self, "first")

    def card(self, student: Card) -> Card:
        return replace(student, weights=(self.w_low, self.w_high))

    def check(self, teaching: Teaching) -> None:
        check_unguided(teaching, self.name)
        self.check_rounds(teaching)

    def learner(self, teaching: Teaching) -> Distiller:
        first = Stage(self.first, lambda: self._first(teaching))
        return Staged([first, *self.rounds(teaching, None, self._weighted, self.steps)])

    def _weighted(self, loss: Loss) -> Loss:
        return Weighted(loss, self.w_low, self.w_high)

    def _first(self, teaching: Teaching) -> LossLearner:
        """Eq. (1)."""
        teacher = AnyGuidance(teaching.unguided, teaching.null)
        loss = Match(weight=self.weight, times="Uniform(margin=0.001)", teacher=teacher)
        return self.fit(teaching, self._weighted(loss), self.first, self.name, "first")

    def _stages(self, teaching: Teaching) -> list[int]:
        return [self.first] + [self.steps] * halvings(self.start, teaching.chain.steps)

    def total(self, teaching: Teaching) -> int:
        return sum(self._stages(teaching))

    def batches(self, teaching: Teaching, start: int) -> Iterator[int]:
        return iter(local_steps(self._stages(teaching), start))
