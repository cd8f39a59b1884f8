"""Adversarial diffusion distillation (Sauer et al. 2023; handbook 3.2.5, corrected).

    (1)  G = x0_hat(x_k, t_k, c),  x_k a real sample noised to a step of the student's chain, t_0 pure noise
    (2)  adversarial:  hinge, D on clean samples, with R1 on the real ones                       (erratum 71)
    (3)  distillation: distill * E c(t) |G - sg(x0_teacher(x_t))|^2,   x_t = alpha sg(G) + sigma eps'   (erratum 72)
         c = alpha ("Alpha", exponential) or SDS's ("Eps", "KL"): SDS's direction with twice c for its weight

The discriminator is a copy of the teacher's network with a linear head on its answer at t = 0, in the place of the
paper's frozen image features, which no network at hand has.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers, Denoiser
from rlfusion.diffusion.parameterization import conditioning
from rlfusion.distill.base import Distiller, Teaching
from rlfusion.distill.generator import Inputs
from rlfusion.distill.matching import Learner, Matching, Parts
from rlfusion.objectives import ADVERSARIAL


def require_input(judge: Denoiser) -> None:
    """Raise ConfigError where a network of this kind can read no clean sample: its time there is infinite."""
    start = torch.zeros((), dtype=torch.float64)
    try:
        conditioning(judge.kind, start, judge.schedule(start))
    except ValueError as error:
        raise ConfigError(f"noised = False: {error}; expected noised = True") from error


@dataclass(frozen=True)
class Config(Matching):
    """Settings of ADD.

    Attributes:
        name: the method.
        inputs: of the generator: "data", real samples noised, or "simulated" by its own chain.
        distill: lambda, the weight of the distillation loss; the adversarial one has 1.
        discriminator_lr: learning rate of D.
        discriminator_updates: its steps for one of the generator.
        r1: coefficient of the gradient penalty on real samples.
        noised: D reads samples noised at the times of ``times``, as in DMD2, instead of clean ones.
    """

    name: Literal["add"] = "add"
    steps: int = 2000
    weight: str = "Alpha()"
    lr: float = 3e-4
    inputs: Inputs = "data"
    distill: float = 2.5
    discriminator_lr: float = 1e-3
    discriminator_updates: int = 1
    r1: float = 10.0
    noised: bool = False

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="Renoise()")
    ANSWERS: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "discriminator_lr", "discriminator_updates")
        require_not_negative(self, "distill", "r1")

    def check(self, teaching: Teaching) -> None:
        super().check(teaching)
        if not self.noised:
            require_input(teaching.own)

    def learner(self, teaching: Teaching) -> Distiller:
        times = self._times if self.noised else None
        parts = Parts(
            **self.parts(teaching, self.inputs),
            matching=2 * self.distill,
            fake_updates=self.discriminator_updates,
            discriminator=self.judging(teaching, ADVERSARIAL["hinge"], times, self.r1, self.discriminator_lr),
            adversarial=1.0,
        )
        draw = self.drawing(teaching, 1 + self.discriminator_updates)
        return Learner(parts, draw, self.optimization(teaching.student), self.warmup, self.steps)
