"""The student of a distillation: what it is, and how it begins.

Where its network, kind and meaning of time are the teacher's, its weights begin as the teacher's. Where they are not,
the same weights would mean something else; then the student first learns to answer as the teacher does, at every noise
level, by its own kind and on its own schedule:

    (1)  L = E | y_student(x_t, t, c) - (a x0_hat + b eps_hat) |^2,     (x0_hat, eps_hat) the teacher's at (x_t, t, c)

with (a, b) the row of the student's kind: the loss of pretraining with the teacher in the place of the pair.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kinds import CM, EDM, InstaFlow
from rlfusion.diffusion.parameterization import named
from rlfusion.models import Card
from rlfusion.pretrain import Draw
from rlfusion.pretrain.denoising import NoisedLoss


@dataclass(frozen=True)
class Config:
    """The properties of the student that differ from its teacher's.

    Attributes:
        net: its network, as of pretrain; empty for the teacher's.
        schedule: its schedule, as of pretrain; empty for the teacher's.
        kind: what it predicts, as of pretrain; empty for the teacher's.
        init: how it begins: with the teacher's weights ("teacher"), which takes the teacher's network, kind and meaning
            of time; by learning to answer as the teacher does ("match"); or from nothing ("random").
        match: updates of "match".
        match_lr: their peak learning rate.
    """

    net: str = ""
    schedule: str = ""
    kind: str = ""
    init: Literal["teacher", "match", "random"] = "teacher"
    match: int = 2000
    match_lr: float = 3e-3

    def __post_init__(self) -> None:
        require_positive(self, "match", "match_lr")

    def card(self, teacher: Card, chain: dict) -> Card:
        """The card of such a student of ``teacher``, before its method has its say."""
        own = teacher.config
        chosen = replace(
            own, net=self.net or own.net, schedule=self.schedule or own.schedule, kind=self.kind or own.kind
        )
        return replace(teacher, config=chosen, chain=chain, weights=())


@dataclass(frozen=True)
class Match(NoisedLoss):
    """Eq. (1). ``weight`` and ``times`` are those of pretraining; at low noise the weight is bounded: what a teacher of
    x0 says of the noise has its error divided by sigma.
    """

    weight: str = "BoundedSNR()"
    times: str = "Uniform(margin=0.001)"
    teacher: nn.Module | None = None

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        at = self.noised(draw, denoiser.schedule)
        p = self.teacher(at.x, at.t, draw.cond)
        return self.regress(denoiser, draw, at, p.x0, p.eps)


def disagreement(student: Card, teacher: Card) -> str:
    """Why weights of ``teacher`` would mean something else in ``student``; "" where they would not."""
    ours, theirs = student.config, teacher.config
    if ours.net != theirs.net:
        return f"student.net = {ours.net!r}, the teacher's is {theirs.net!r}"
    if teacher.weights and not student.weights:
        return "the teacher reads the guidance weight, the student does not"
    mine, other = named(ours.kind), named(theirs.kind)
    of_the_ratio = isinstance(mine, CM | EDM | InstaFlow)
    alike = mine == other or (isinstance(mine, CM) and other == EDM(mine.sigma_data))
    if not alike:
        return f"student.kind = {ours.kind!r}, the teacher's is {theirs.kind!r}"
    if ours.schedule != theirs.schedule and not of_the_ratio:
        return f"student.schedule = {ours.schedule!r}, the teacher's is {theirs.schedule!r}, and {ours.kind} reads t"
    return ""


def require_agreement(student: Card, teacher: Card) -> None:
    """Raise ConfigError where a student cannot take the weights of the teacher."""
    why = disagreement(student, teacher)
    if why:
        raise ConfigError(f"student.init = teacher: {why}; expected match (or random)")


def adopt(student: Denoiser, teacher: Denoiser) -> None:
    """Give ``student`` the weights of ``teacher``; what reads the guidance weight beside them begins at 0."""
    held = teacher.net.state_dict()
    if student.weights and not teacher.weights:
        held = {("label." + name if name.startswith("label.") else name): value for name, value in held.items()}
    left = student.net.load_state_dict(held, strict=False)
    strange = [name for name in left.missing_keys if not name.startswith("label.weight.")] + left.unexpected_keys
    if strange:
        raise ConfigError(f"student.init = teacher: the networks differ in {', '.join(strange[:5])}")
