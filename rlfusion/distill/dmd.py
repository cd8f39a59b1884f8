"""Distribution matching distillation (Yin et al. 2023, 2024; handbook 3.2.4, corrected): DMD and DMD2.

VSD's direction, of size 1 for each sample, and with it

    (1)  a discriminator of real and generated samples, both noised, logits and the non-saturating loss (erratum 70)
    (2)  pairs of the teacher, d(G(z), x_0): the regression of the first DMD, off by default as in DMD2
    (3)  K steps: inputs are simulated by the student's own chain (DMD2), or are real samples noised

The discriminator is a copy of the teacher's network with a linear head on its answer (Critic).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rlfusion.common import spec
from rlfusion.common.errors import require_not_negative
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers
from rlfusion.distill.base import Distiller, Teaching
from rlfusion.distill.generator import Inputs
from rlfusion.distill.matching import Following, Learner, Parts, Regression
from rlfusion.distill.pairs import Making, PairDraws
from rlfusion.objectives import ADVERSARIAL
from rlfusion.pretrain.metrics import METRICS, Metric


@dataclass(frozen=True)
class Config(Following):
    """Settings of DMD.

    Attributes:
        name: the method.
        inputs: of the generator's later steps: "simulated" by its own chain, or "data", real samples noised.
        adversarial: weight of the generator's adversarial loss; 0 is no discriminator.
        discriminator_lr: its learning rate.
        r1: coefficient of the gradient penalty on real samples.
        regression: weight of the loss on pairs of the teacher; 0 is none.
        metric: d of Eq. (2): L2(), PseudoHuber(c=...) or LPIPS(net=..., weights=..., size=...).
        pairs: how those pairs are made.
    """

    name: Literal["dmd"] = "dmd"
    steps: int = 1500
    weight: str = "Normalized()"
    lr: float = 3e-4
    fake_updates: int = 5
    inputs: Inputs = "simulated"
    adversarial: float = 0.01
    discriminator_lr: float = 1e-3
    r1: float = 0.0
    regression: float = 0.0
    metric: str = "L2()"
    pairs: Making = field(default_factory=Making)

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="Renoise()")
    ANSWERS: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "adversarial", "r1", "regression", "discriminator_lr")
        _ = self._metric  # refuses what no table holds

    @property
    def _metric(self) -> Metric:
        return spec.parse(self.metric, METRICS, "metric")

    def check(self, teaching: Teaching) -> None:
        super().check(teaching)
        if self.regression:
            self._metric.check(teaching.student.space)
            self.pairs.check(teaching.card, teaching.own)

    def learner(self, teaching: Teaching) -> Distiller:
        judge = None
        if self.adversarial:
            judge = self.judging(teaching, ADVERSARIAL["nonsaturating"], self._times, self.r1, self.discriminator_lr)
        parts = Parts(
            **self.parts(teaching, self.inputs),
            discriminator=judge,
            adversarial=self.adversarial,
            regression=self._regression(teaching) if self.regression else None,
        )
        draw = self.drawing(teaching, 1 + self.fake_updates)
        return Learner(parts, draw, self.optimization(teaching.student), self.warmup, self.steps)

    def _regression(self, teaching: Teaching) -> Regression:
        key = (teaching.seed, "distill", "regression")
        classes = teaching.card.classes
        pairs = PairDraws(teaching.pairs(self.pairs), classes, self.batch, self.steps, teaching.device, *key)
        return Regression(pairs, self._metric, self.regression)
