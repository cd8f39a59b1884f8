"""A diffusion model as a consistency function, by a wrapper with a denoiser's call (Luo et al. 2023; handbook 2.3).

    (1)  f = c_skip x_t + c_out x0_hat,   c_skip = sd^2 / (s^2 + sd^2),   c_out = s / sqrt(s^2 + sd^2),   s = scaling k

k = T t - 1 is the code time, 0 at the first time of the table: there f = x_t, the boundary condition. In continuous
time T = 1000. A consistency model in the sense of Song et al. 2023 is no wrapper but the kind ``kinds.CM``.
"""

import torch
from torch import Tensor, nn

from rlfusion.common.errors import require_positive
from rlfusion.common.tensors import Cond, cast
from rlfusion.diffusion.denoiser import Denoiser, Own, Precision
from rlfusion.diffusion.kinds import Kind
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.schedule import Schedule, level
from rlfusion.diffusion.space import Space

RESOLUTION = 1000
"""T of Eq. (1) in continuous time."""


class LCM(nn.Module):
    """Eq. (1) around ``denoiser``; eps is (x_t - alpha f) / sigma, t >= 1 / T. What is said of the denoiser (network,
    kind, precision, space, guidance weights) is said of it too.
    """

    def __init__(self, denoiser: Denoiser, sigma_data: float = 0.5, scaling: float = 10.0) -> None:
        super().__init__()
        self.schedule: Schedule = denoiser.schedule
        self.denoiser, self.sigma_data, self.scaling = denoiser, sigma_data, scaling
        require_positive(self, "sigma_data", "scaling")

    @property
    def space(self) -> Space:
        """What x is a latent of."""
        return self.denoiser.space

    @space.setter
    def space(self, space: Space) -> None:
        self.denoiser.space = space

    @property
    def own(self) -> Own | None:
        return self.denoiser.own

    @property
    def precision(self) -> Precision:
        """Of the network's own arithmetic."""
        return self.denoiser.precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        self.denoiser.precision = precision

    @property
    def channels_last(self) -> bool:
        """Whether it is given images with their channels last in memory."""
        return self.denoiser.channels_last

    @channels_last.setter
    def channels_last(self, last: bool) -> None:
        self.denoiser.channels_last = last

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self.denoiser.net

    @property
    def kind(self) -> str | Kind:
        """What the network predicts."""
        return self.denoiser.kind

    @property
    def weights(self) -> tuple[float, float] | None:
        return self.denoiser.weights

    @property
    def start(self) -> float:
        """The time 1 / T at which f = x_t."""
        return 1 / self._resolution

    @property
    def _resolution(self) -> int:
        return self.schedule.resolution or RESOLUTION

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        l = level(self.schedule, t, x)
        skip, out = (cast(c.reshape(l.alpha.shape), x) for c in self.boundary(t))
        f = skip * x + out * self.denoiser(x, t, cond).x0
        return Prediction(f, (x - cast(l.alpha, x) * f) / cast(l.sigma, x))

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) of Eq. (1), float64, shaped as ``t``."""
        s = self.scaling * (t.double() * self._resolution - 1)
        s = torch.where(s.abs() < 1e-6, torch.zeros_like(s), s)  # k / T * T is not k in floating point
        norm = s.square() + self.sigma_data**2
        return self.sigma_data**2 / norm, s * norm.rsqrt()
