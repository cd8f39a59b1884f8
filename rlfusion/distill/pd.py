"""Progressive distillation (Salimans & Ho 2022, Alg. 2; handbook 3.2.1, Eq. 40, corrected).

A round halves the steps: a student of K steps learns what its teacher does in two of 2K, then it is the teacher. From
t to s = t - 1/K by way of the middle, with eta = 0 (erratum 62) and the second step from where the first arrived (60):

    (1)  x~_mid = DDIM(x_t; teacher),   x~_s = DDIM(x~_mid; teacher),   x_t = alpha x0 + sigma eps
    (2)  x0* = (x~_s - r x_t) / (alpha_s - r alpha_t),   r = sigma_s / sigma_t,   eps* = (x_t - alpha_t x0*) / sigma_t
    (3)  L = w |x0* - x0_hat|^2,   w = max(SNR, 1) (truncated SNR: the larger of the x0 and the eps error) or SNR + 1

x0* is the x0_hat with which one DDIM step of the student goes from x_t to x~_s. It is finite at zero terminal SNR,
alpha_t = 0, where eps* = x_t / sigma_t, and is x~_s itself at s = 0. M rounds from ``start`` steps leave start / 2^M
(erratum 61).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import cast
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser, require_readable
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.schedule import Level, diffused, level
from rlfusion.distill.base import Distiller, Settings, Teaching
from rlfusion.distill.ode import along
from rlfusion.distill.stages import Stage, Staged, local_steps
from rlfusion.pretrain import Draw, Loss, LossLearner
from rlfusion.pretrain.denoising import Noised, NoisedLoss

Wrap = Callable[[Loss], Loss]


def target(x_t: Tensor, x_s: Tensor, t: Level, s: Level) -> Prediction:
    """Eq. (2), each (B, *), for levels shaped to act on them."""
    r = s.sigma / t.sigma
    x0 = (x_s - cast(r, x_t) * x_t) / cast(s.alpha - r * t.alpha, x_t)
    return Prediction(x0, (x_t - cast(t.alpha, x_t) * x0) / cast(t.sigma, x_t))


def halvings(start: int, steps: int) -> int:
    """M, with start = 2^M steps.

    Raises:
        ConfigError: there is no such M >= 1.
    """
    rounds = (start // steps).bit_length() - 1
    if rounds < 1 or start != steps << rounds:
        raise ConfigError(f"start = {start}, chain.steps = {steps}: expected start = 2, 4, 8, ... times chain.steps")
    return rounds


@dataclass(frozen=True)
class Halving(NoisedLoss):
    """Eq. (3) of one round, on the network's own error (``pretrain.weighting``).

    Attributes:
        teacher: of the round.
        grid: its falling times (2K + 1,), the student's every second.
    """

    teacher: nn.Module | None = None
    grid: Tensor | None = None

    def __call__(self, denoiser: Denoiser, target_: Denoiser, draw: Draw) -> Tensor:
        steps = len(self.grid) // 2
        j = 2 * (draw.u * steps).long().clamp(max=steps - 1)
        times = [self.grid[j + k] for k in range(3)]
        t, s = (level(denoiser.schedule, times[k], draw.x0) for k in (0, 2))
        x_t = diffused(draw.x0, draw.eps, t)
        goal = target(x_t, along(self.teacher, x_t, times, draw.cond), t, s)
        return self.regress(denoiser, draw, Noised(x_t, times[0], t), goal.x0, goal.eps)


@dataclass(frozen=True)
class Rounds(Settings):
    """The settings of the rounds, and what is made of them.

    Attributes:
        start: steps of the teacher's chain in the first round, 2^M times those of ``chain``.
        weight: w, TruncatedSNR() or SNRPlusOne().
    """

    start: int = 32
    weight: Literal["TruncatedSNR()", "SNRPlusOne()"] = "TruncatedSNR()"

    CHAIN: ClassVar[Chain] = Chain(steps=4, kernel="DDIM(eta=0.0)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight not in ("TruncatedSNR()", "SNRPlusOne()"):
            raise ConfigError(f"weight = {self.weight!r}: expected TruncatedSNR() or SNRPlusOne()")
        if self.start < 2:
            raise ConfigError(f"start = {self.start}: expected at least 2")

    def check_rounds(self, teaching: Teaching) -> None:
        """Refuse a chain that the rounds do not end at, and a kind that a step of them is not defined for.

        Raises:
            ConfigError: says which and why.
        """
        student, chain = teaching.student, teaching.chain
        halvings(self.start, chain.steps)
        if chain.spacing != "trailing" or chain.repeats:
            raise ConfigError("chain.spacing, chain.repeats: expected trailing and 0, the grid that the rounds halve")
        resolution = student.schedule.resolution
        if resolution is not None and resolution % self.start:
            raise ConfigError(
                f"start = {self.start}: expected a divisor of the {resolution} times of {student.schedule}"
            )
        require_readable(student, self.grid(teaching, self.start)[:-1])

    def grid(self, teaching: Teaching, steps: int) -> Tensor:
        """The falling times of a chain of ``steps``."""
        return TimeGrid(steps).times(teaching.student.schedule)

    def rounds(self, teaching: Teaching, first: nn.Module | None, wrap: Wrap, total: int) -> list[Stage]:
        """A stage of ``total`` updates for each round; ``first`` teaches in the first of them (None: the student as it
        is then, as in all others), and ``wrap`` is done to the loss of each.
        """
        count = halvings(self.start, teaching.chain.steps)
        return [Stage(total, lambda r=r: self._round(teaching, r, first, wrap, total)) for r in range(count)]

    def _round(self, teaching: Teaching, r: int, first: nn.Module | None, wrap: Wrap, total: int) -> LossLearner:
        teacher, kept = first, {}
        if r or first is None:
            teacher = copy.deepcopy(teaching.student).requires_grad_(False)
            kept = {"round_teacher": teacher}
        loss = Halving(weight=self.weight, teacher=teacher, grid=self.grid(teaching, self.start >> r))
        return self.fit(teaching, wrap(loss), total, self.name, "round", r, kept=kept)


@dataclass(frozen=True)
class Config(Rounds):
    """Settings of progressive distillation. ``steps`` are those of each round; a run has log2(start / chain.steps)
    rounds. The student begins with the teacher's weights, so it is of its network and kind.

    Attributes:
        name: the method.
        start: steps of the teacher's chain in the first round, 2^M times those of ``chain``.
        weight: w, TruncatedSNR() or SNRPlusOne().
    """

    name: Literal["pd"] = "pd"
    steps: int = 1000

    def check(self, teaching: Teaching) -> None:
        self.check_rounds(teaching)

    def learner(self, teaching: Teaching) -> Distiller:
        return Staged(self.rounds(teaching, teaching.teacher, lambda loss: loss, self.steps))

    def total(self, teaching: Teaching) -> int:
        return self.steps * halvings(self.start, teaching.chain.steps)

    def batches(self, teaching: Teaching, start: int) -> Iterator[int]:
        rounds = halvings(self.start, teaching.chain.steps)
        return iter(local_steps([self.steps] * rounds, start))
