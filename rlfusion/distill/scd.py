"""Continuous-time consistency distillation in TrigFlow, sCD (Lu & Song 2024; handbook 2.5.1, 3.2.6).

The loss of sCT (``pretrain.continuous``, Eq. 3, 4) with

    (1)  dx/da = the teacher's V at x: -sin a x0_hat + sd cos a eps_hat,  in the place of that of the pair (x0, eps)

Before the tangent is normalised both have one expected gradient, for the loss is linear in dx/da; after it, sCD's has
the smaller variance.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers, Denoiser
from rlfusion.distill.base import Distiller, Settings, Teaching
from rlfusion.distill.student import Config as Student
from rlfusion.pretrain import Draw, Loss
from rlfusion.pretrain.continuous import SCT


@dataclass(frozen=True)
class SCD(Loss):
    """Eq. (1) in the loss of ``sct``."""

    sct: SCT
    teacher: nn.Module

    def __call__(self, denoiser: Denoiser, target: Denoiser, draw: Draw) -> Tensor:
        at = self.sct.noised(denoiser, draw)
        return self.sct.along(denoiser, draw, at, *self.teacher(at.x, at.t, draw.cond))


@dataclass(frozen=True)
class Config(Settings):
    """Settings of sCD. The student is of kind TrigFlow(sigma_data=...) on Trig(sigma_data=...); forward-mode
    derivatives want a network of smooth time (``frequency``).

    Attributes:
        name: the method.
        times: how t is drawn: LogNormal(mean=..., std=...) of tan a, Uniform(margin=...), LogitNormal(...).
        rise: steps over which the tangent's share of the network's derivative rises to all of it.
        c: the tangent g becomes g / (|g| + c).
    """

    name: Literal["scd"] = "scd"
    times: str = "Uniform(margin=0.001)"
    rise: int = 1000
    c: float = 1.0
    lr: float = 1e-4

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="Renoise()")
    ANSWERS: ClassVar[Answers] = "end"
    STUDENT: ClassVar[Student] = Student(
        net="ResidualMLP(width=128, depth=3, frequency=2.0)",
        schedule="Trig(sigma_data=0.75)",
        kind="TrigFlow(sigma_data=0.75)",
        init="match",
        match=6000,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._sct  # refuses what it cannot be made of

    @property
    def _sct(self) -> SCT:
        return SCT(self.times, self.rise, self.c)

    def check(self, teaching: Teaching) -> None:
        self._sct.check(teaching.student)

    def learner(self, teaching: Teaching) -> Distiller:
        return self.fit(teaching, SCD(self._sct, teaching.teacher), self.steps, self.name)
