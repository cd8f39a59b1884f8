"""Reflow (Liu et al. 2022, 2023; handbook 2.4, corrected): straighter paths by training on one's own pairs.

    (1)  round r: pairs (x_0, eps), x_0 where the ODE of the model of round r - 1 takes the noise eps, fresh in every
         round; round 1's are the teacher's
    (2)  L = E w(t) | y_theta(x_t, t, c) - (a x_0 + b eps) |^2,   x_t = alpha x_0 + sigma eps of one pair (erratum 47)

With a flow on ``Rectified`` this is Eq. 29, k-rectified flow after k - 1 rounds (of a 1-RF teacher). From a diffusion
teacher the student may be

    InstaFlow, flow, ...    a kind of its own, matched to the teacher first (student.kind, student.init): Approach 1
    the teacher's kind      and w = ((alpha + sigma) / alpha)^2 on the eps error, the error in u = x0 - eps that the
                            network has under the mapping of 2.4.5: weight "RectifiedFlow(cap=...)"; w has no bound as
                            alpha -> 0, hence the cap (errata 48-52)

DDIM(eta=0) of the student is Euler's method on its straight paths, for every kind. A last step to a map, the loss at
t = 1 alone, is the method ``regression``: "distillation" in the papers (erratum 42).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rlfusion.common.errors import require_positive
from rlfusion.diffusion.chain import Chain
from rlfusion.distill.base import Distiller, Settings, Teaching
from rlfusion.distill.pairs import Making, PairDraws
from rlfusion.distill.stages import Stage, Staged, local_steps
from rlfusion.pretrain import LossLearner
from rlfusion.pretrain.denoising import Denoising


@dataclass(frozen=True)
class Config(Settings):
    """Settings of reflow.

    Attributes:
        name: the method.
        rounds: of new pairs and ``steps`` updates on them.
        weight: w(t), as of pretrain's Denoising; RectifiedFlow(cap=...) for the mapping of 2.4.5.
        times: how t is drawn, as of pretrain's Denoising.
        pairs: how the pairs are made.
    """

    name: Literal["reflow"] = "reflow"
    rounds: int = 1
    weight: str = "Own()"
    times: str = "Uniform()"
    pairs: Making = field(default_factory=Making)

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="DDIM(eta=0.0)")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "rounds")
        _ = self._loss  # refuses what no table holds

    @property
    def _loss(self) -> Denoising:
        return Denoising(weight=self.weight, times=self.times)

    def check(self, teaching: Teaching) -> None:
        self._loss.check(teaching.student)
        for source in (teaching.own, teaching.student)[: self.rounds]:
            self.pairs.check(teaching.card, source)

    def total(self, teaching: Teaching) -> int:
        return self.rounds * self.steps

    def batches(self, teaching: Teaching, start: int) -> Iterator[Any]:
        return iter(local_steps([self.steps] * self.rounds, start))

    def learner(self, teaching: Teaching) -> Distiller:
        if self.rounds == 1:
            return self._round(teaching, 0)
        return Staged([Stage(self.steps, lambda r=r: self._round(teaching, r)) for r in range(self.rounds)])

    def _round(self, teaching: Teaching, r: int) -> LossLearner:
        """Eq. (2) in round r, on pairs of the model as it is when the round begins: part of the round's state."""
        source = copy.deepcopy(teaching.student).requires_grad_(False) if r else None
        pairs = teaching.pairs(self.pairs, f"pairs-{r + 1}", source, r)
        key = (teaching.seed, "distill", self.name, r)
        about = (teaching.card.classes, self.batch, self.steps, teaching.device)
        draws = PairDraws(pairs, *about, *key, dropout=self.label_dropout)
        kept = {"source": source} if source else None
        return LossLearner(teaching.student, self._loss, draws, self.optimization(teaching.student), self.warmup, kept)
