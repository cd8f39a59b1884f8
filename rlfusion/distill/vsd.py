"""Variational score distillation (Wang et al. 2023; handbook 3.2.3, corrected): the generator's law to the teacher's.

    (1)  gradient = E w(t) (e_teacher(x_t, t, c) - e_fake(x_t, t, c)) dG / dtheta,    x_t = alpha G + sigma eps
    (2)  fake:  min E |e_fake(x_t, t, c) - eps|^2 on generated samples, ``fake_updates`` steps for one of the generator

Eq. (1) is the gradient of a KL between the noised laws, which is 0 where the laws are one (alpha > 0; erratum 67). The
fake denoiser begins as the teacher, has an optimiser of its own, and no guidance.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers
from rlfusion.distill.base import Distiller, Teaching
from rlfusion.distill.matching import Following, Learner, Parts


@dataclass(frozen=True)
class Config(Following):
    """Settings of VSD.

    Attributes:
        name: the method.
    """

    name: Literal["vsd"] = "vsd"
    steps: int = 1500
    lr: float = 3e-4

    CHAIN: ClassVar[Chain] = Chain(steps=1, kernel="Renoise()")
    ANSWERS: ClassVar[Answers] = "end"

    def learner(self, teaching: Teaching) -> Distiller:
        parts = Parts(**self.parts(teaching))
        draw = self.drawing(teaching, 1 + self.fake_updates)
        return Learner(parts, draw, self.optimization(teaching.student), self.warmup, self.steps)
