"""A denoiser on another schedule: a wrapper that matches the signal-to-noise ratio.

With x_t = alpha x0 + sigma eps on ``schedule`` and t' the time of the denoiser's own with the same ratio,

    (1)  sigma'(t') / alpha'(t') = sigma(t) / alpha(t),     x' = c x_t,  c = alpha' / alpha = sigma' / sigma

x' has the same x0 and eps, so the answer at (x', t') is the answer here. Ratios beyond those of the denoiser's schedule
are taken for its ends; how far beyond is limited when the wrapper is made.
"""

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond, cast
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.schedule import Schedule, level, time_of
from rlfusion.diffusion.space import Space

FARTHEST = 0.1
"""The largest gap of atan(sigma / alpha), in radians, between the ends of the schedules: VP() ends 0.007 short of pure
noise, Karras() 0.013."""


class OnSchedule(nn.Module):
    """Eq. (1) around ``denoiser``.

    Raises:
        ConfigError: the schedules begin or end at levels that are too far apart.
    """

    def __init__(self, denoiser: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        mine, theirs = (torch.atan2(l.sigma, l.alpha) for l in (schedule(ends), denoiser.schedule(ends)))
        if float((mine - theirs).abs().max()) > FARTHEST:
            raise ConfigError(
                f"student.schedule = {schedule}: its noise runs from {mine[0]:.3f} to {mine[1]:.3f} (atan of sigma / "
                f"alpha), the teacher's {denoiser.schedule} from {theirs[0]:.3f} to {theirs[1]:.3f}, expected ends "
                f"within {FARTHEST}"
            )

    @property
    def space(self) -> Space:
        return self.denoiser.space

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        l = level(self.schedule, t, x)
        at = time_of(self.denoiser.schedule, l.alpha, l.sigma)
        own = self.denoiser.schedule(at)
        c = (own.alpha.square() + own.sigma.square()).sqrt() / (l.alpha.square() + l.sigma.square()).sqrt()
        return self.denoiser(cast(c, x) * x, at.reshape(t.shape), cond)


def on_its_own(teacher: nn.Module) -> nn.Module:
    """The teacher within this wrapper, if it is in one: on the schedule that is its own."""
    return teacher.denoiser if isinstance(teacher, OnSchedule) else teacher
