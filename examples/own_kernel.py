"""A sampler of your own in one file: DDIM whose noise fades towards the data.

rlfusion finetune --chain.kernel 'examples/own_kernel.py:Fading(most=1.0)'

(1)  x_s = alpha_s x0_hat + sqrt(sigma_s^2 - S^2) eps_hat + S z,   S = eta_s S_DDPM,   eta_s = most sigma_s
"""

from dataclasses import dataclass

from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.kernel.base import Coefficients
from rlfusion.diffusion.schedule import Level


@dataclass(frozen=True)
class Fading:
    """Eq. (1): DDIM with an eta that falls with the noise; on a variance-preserving schedule.

    Attributes:
        most: eta at pure noise, in (0, 1].
    """

    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.most <= 1:
            raise ConfigError(f"most = {self.most}: expected a number in (0, 1]")

    @property
    def stochastic(self) -> bool:
        return True

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        std = self.most * s.sigma * DDIM(1.0).coefficients(t, s, dt).std
        return Coefficients(s.alpha, (s.sigma.square() - std.square()).clamp(min=0).sqrt(), std)
