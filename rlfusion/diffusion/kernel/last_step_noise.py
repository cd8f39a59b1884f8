"""A density for the step to clean data: the option ``last_noise`` of a chain, of every kernel.

    (9)  p(x_s | x_t) = N(A x0_hat, std^2 I)  where the kernel's own step is x0_hat itself (B = S = 0); else as it is

Without it the last step is deterministic: a one-step model then has no log-probability, and a policy gradient nothing
to work on. The noise is real: the samples of the chain have it, and the policy learns the mean reward over it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlfusion.common.errors import require_positive
from rlfusion.diffusion.kernel.base import Coefficients, Kernel
from rlfusion.diffusion.schedule import Level


@dataclass(frozen=True)
class LastStepNoise:
    """Eq. (9) around ``kernel``."""

    kernel: Kernel
    std: float

    def __post_init__(self) -> None:
        require_positive(self, "std")

    @property
    def stochastic(self) -> bool:
        return True

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        a, b, std = self.kernel.coefficients(t, s, dt)
        return Coefficients(a, b, torch.where((b == 0) & (std == 0), self.std, std))
