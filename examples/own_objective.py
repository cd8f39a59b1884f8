"""A pretraining objective of your own in one file: the absolute error of x0 in place of its square.

rlfusion pretrain --objective 'examples/own_objective.py:Absolute(margin=0.02)'
"""

from dataclasses import dataclass

from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import diffused, level
from rlfusion.pretrain import Draw, Loss


@dataclass(frozen=True)
class Absolute(Loss):
    """Mean of |x0_hat - x0| over the features, at times drawn uniformly from [margin, 1 - margin].

    Attributes:
        margin: the least time, in [0, 0.5).
    """

    margin: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 0.5:
            raise ConfigError(f"margin = {self.margin}: expected a number in [0, 0.5)")

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        t = self.margin + (1 - 2 * self.margin) * draw.u
        x = diffused(draw.x0, draw.eps, level(denoiser.schedule, t, draw.x0))
        return (denoiser(x, t, draw.cond).x0 - draw.x0).abs().flatten(1).mean(1)
