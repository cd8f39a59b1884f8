"""Score distillation sampling (Poole et al. 2022; handbook 3.2.2, corrected): samples pulled to the teacher's modes.

    (1)  gradient = E w(t) (e_teacher(x_t, t, c) - eps) dG / dtheta,    x_t = alpha G + sigma eps   (erratum 63: sign)

For a generator that is a set of points this is the gradient of KL(p_t || q_t), p_t the noised point: each point goes to
a mode of the teacher's noised law ("points"). For a network G(z) it is not: the entropy of the generator is left out
(erratum 64), and G forgets z; on N(m, s^2) it ends at (m, 0), all samples of a condition alike ("network").
VSD adds what is missing.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers
from rlfusion.distill.base import Distiller, Teaching
from rlfusion.distill.matching import Learner, Matching, Parts
from rlfusion.models import Card


@dataclass(frozen=True)
class Config(Matching):
    """Settings of SDS.

    Attributes:
        name: the method.
        form: what is moved: the weights of a network G(z), or points of each class themselves.
        points: how many of each class, for form "points"; the student then is those points, drawn evenly.
    """

    name: Literal["sds"] = "sds"
    steps: int = 1000
    lr: float = 3e-4
    form: Literal["network", "points"] = "network"
    points: int = 32

    CHAIN: ClassVar[Chain] = Chain(steps=1, kernel="Renoise()")
    ANSWERS: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "points")

    def card(self, student: Card) -> Card:
        if self.form == "network":
            return student
        return replace(student, config=replace(student.config, net=f"Points(count={self.points})", kind="x0"))

    def check(self, teaching: Teaching) -> None:
        super().check(teaching)
        if self.form == "points" and len(teaching.times) != 2:
            raise ConfigError(f"chain.steps = {len(teaching.times) - 1}: points have no steps, expected 1")

    def learner(self, teaching: Teaching) -> Distiller:
        parts = Parts(**self.parts(teaching))
        return Learner(parts, self.drawing(teaching, 1), self.optimization(teaching.student), self.warmup, self.steps)
