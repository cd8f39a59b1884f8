"""Regression on pairs of an ODE: noise to sample in one step (Luhman & Luhman 2021; handbook 2.4.1).

    (1)  L = E d( f_theta(sigma(1) z, 1, c), x_0 ),    x_0 where the teacher's ODE takes z

For a flow it is rectified flow's distillation: its reflow loss at the noise end alone, which leaves a map and no field
(erratum 42). Best after reflow, whose paths do not cross.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers, Denoiser
from rlfusion.distill.base import Distiller, Settings, Teaching
from rlfusion.distill.pairs import Making, PairDraws
from rlfusion.pretrain import Draw, Loss, LossLearner
from rlfusion.pretrain.metrics import METRICS, Metric


@dataclass(frozen=True)
class Ends(Loss):
    """Eq. (1)."""

    metric: Metric

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        start = torch.ones((), dtype=torch.float64)
        x = draw.eps * float(denoiser.schedule(start).sigma)
        return self.metric(denoiser(x, start, draw.cond).x0, draw.x0)


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the regression on pairs.

    Attributes:
        name: the method.
        metric: d: L2(), PseudoHuber(c=...) or LPIPS(net=..., weights=..., size=...).
        pairs: how the pairs are made.
    """

    name: Literal["regression"] = "regression"
    metric: str = "PseudoHuber(c=0.03)"
    pairs: Making = field(default_factory=Making)

    CHAIN: ClassVar[Chain] = Chain(steps=1, kernel="DDIM(eta=0.0)")
    ANSWERS: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._metric  # refuses what no table holds

    @property
    def _metric(self) -> Metric:
        return spec.parse(self.metric, METRICS, "metric")

    def check(self, teaching: Teaching) -> None:
        self._metric.check(teaching.student.space)
        self.pairs.check(teaching.card, teaching.own)
        if teaching.chain.moves != 1:
            raise ConfigError(f"chain.steps = {teaching.chain.steps}: the student is a map of one step, expected 1")
        if teaching.times[0] != 1:
            raise ConfigError(f"chain.spacing = {teaching.chain.spacing}: the map is from t = 1, expected trailing")
        if self.label_dropout:
            raise ConfigError(
                f"label_dropout = {self.label_dropout}: without its label a noise has a pair in every class, and no "
                "map goes to all, expected 0"
            )

    def learner(self, teaching: Teaching) -> Distiller:
        key = (teaching.seed, "distill", self.name)
        pairs = teaching.pairs(self.pairs)
        draws = PairDraws(pairs, teaching.card.classes, self.batch, self.steps, teaching.device, *key)
        return LossLearner(
            teaching.student, Ends(self._metric), draws, self.optimization(teaching.student), self.warmup
        )
