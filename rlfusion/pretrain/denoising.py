"""Supervised denoising (handbook 2.2.2, 3.1): one loss for every schedule, kind of prediction, weight and law of times.

    (1)  L = E_{x0, eps, t} w(t) | y_theta(x_t, t, c) - (a x0 + b eps) |^2,     x_t = alpha x0 + sigma eps

with (a, b) the row of the kind: eps-, x0- and v-prediction, denoising score matching, NCSN, EDM, rectified flow and the
diffusion objective of TrigFlow are rows of ``presets``, not code.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from rlfusion import spec
from rlfusion.denoiser import Denoiser
from rlfusion.objectives import weighted_mse
from rlfusion.parameterization import target
from rlfusion.pretrain.base import Draw, Loss
from rlfusion.pretrain.times import TIMES, Times
from rlfusion.pretrain.weighting import WEIGHTS, Weight
from rlfusion.schedule import level
from rlfusion.tensors import cast


@dataclass(frozen=True)
class Denoising(Loss):
    """Eq. (1), the mean over features.

    Attributes:
        weight: w(t), on the network's own error: Own(), SNR(), TruncatedSNR(), SNRPlusOne(), MinSNR(gamma=...).
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

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        t = self._times(draw.u, denoiser.schedule)
        l = level(denoiser.schedule, t, draw.x0)
        x = cast(l.alpha, draw.x0) * draw.x0 + cast(l.sigma, draw.x0) * draw.eps
        y = denoiser.answer(x, t, draw.cond)
        weight = cast(self._weight(denoiser.kind, l).flatten(), y)
        return weighted_mse(y, target(denoiser.kind, draw.x0, draw.eps, l), weight)
