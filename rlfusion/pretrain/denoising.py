"""Supervised denoising (handbook 2.2.2, 3.1): one loss for every schedule, kind of prediction, weight and law of times.

    (1)  L = E_{x0, eps, t} w(t) | y_theta(x_t, t, c) - (a x0 + b eps) |^2,     x_t = alpha x0 + sigma eps

with (a, b) the row of the kind: eps-, x0- and v-prediction, denoising score matching, NCSN, EDM, rectified flow and the
diffusion objective of TrigFlow are rows of ``presets``, not code.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.tensors import cast
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kinds import Kind
from rlfusion.diffusion.parameterization import solve, target
from rlfusion.diffusion.schedule import Level, Schedule, diffused, level
from rlfusion.objectives import weighted_mse
from rlfusion.objectives.times import TIMES, Times
from rlfusion.objectives.weighting import WEIGHTS, Weight
from rlfusion.pretrain.base import Draw, Loss


class Noised(NamedTuple):
    """x = x_t (B, *) of a draw, its times (B,) and their level, shaped to act on x."""

    x: Tensor
    t: Tensor
    l: Level


@dataclass(frozen=True)
class NoisedLoss(Loss):
    """Common settings of all losses on noised data: the weight w of Eq. (1) and the law of t.

    Attributes:
        weight: w(t), on the network's own error: Own(), SNR(), TruncatedSNR(), SNRPlusOne(), MinSNR(gamma=...),
            BoundedSNR(low=..., high=...), VLB(), RectifiedFlow(cap=...).
        times: how t is drawn: Uniform(margin=...), LogitNormal(mean=..., std=...), LogNormal(mean=..., std=...).
    """

    weight: str = "Own()"
    times: str = "Uniform()"

    def __post_init__(self) -> None:
        _ = self._weight, self._times  # refuses what no table holds

    @cached_property
    def _weight(self) -> Weight:
        return spec.parse(self.weight, WEIGHTS, "loss weight")

    @cached_property
    def _times(self) -> Times:
        return spec.parse(self.times, TIMES, "distribution of times")

    def noised(self, draw: Draw, schedule: Schedule) -> Noised:
        """The draw's samples at the draw's times."""
        t = self._times(draw.u, schedule)
        l = level(schedule, t, draw.x0)
        return Noised(diffused(draw.x0, draw.eps, l), t, l)

    def regress(self, denoiser: Denoiser, draw: Draw, at: Noised, x0: Tensor, eps: Tensor) -> Tensor:
        """Eq. (1) with the target of the pair (x0, eps), the mean over features, (B,)."""
        y = denoiser.answer(at.x, at.t, draw.cond)
        return self.distance(y, target(denoiser.kind, x0, eps, at.l), denoiser.kind, at.l)

    def distance(self, y: Tensor, other: Tensor, kind: str | Kind, l: Level) -> Tensor:
        """w(t) | y - other |^2, the mean over features, (B,), of two answers of that kind at a level."""
        return weighted_mse(y, other, cast(self._weight(kind, l).flatten(), y))

    def eps_weight(self, denoiser: Denoiser, l: Level) -> Tensor:
        """The weight (B,) of the eps error that w(t) is: both by way of the x0 error."""
        ratio = solve("eps", l).x0_y / solve(denoiser.kind, l).x0_y
        return (self._weight(denoiser.kind, l) * ratio.square()).flatten()


@dataclass(frozen=True)
class Denoising(NoisedLoss):
    """Eq. (1), the mean over features. Denoising score matching (Vincent 2011) is ``weight='SNR()'`` on the "score"."""

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        return self.regress(denoiser, draw, self.noised(draw, denoiser.schedule), draw.x0, draw.eps)
