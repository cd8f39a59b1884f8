"""A critic: a network that answers one number for a noised sample, such as the reward to expect of it.

    (1)  q(x_t, t, c) = w . y(x_t, t, c) + b,     y the answer (B, *) of a network with a denoiser's call

So every network that can denoise can judge: a new one, or a copy of the denoiser itself, which knows its images.
The denoiser around it scales x and t as its kind does, so that a critic works on every schedule.
"""

import math

from torch import Tensor, nn

from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Denoiser, Embedded
from rlfusion.diffusion.schedule import Schedule


class Critic(nn.Module):
    """Eq. (1). ``denoiser`` is the critic's own: its network, and its kind and schedule for the scales."""

    def __init__(self, denoiser: Denoiser | Embedded, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.denoiser, self.head = denoiser, nn.Linear(math.prod(shape), 1)

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """x (B, *shape), t () or (B,) float64 on the CPU, cond of batch B -> (B,)."""
        return self.head(self.denoiser.answer(x, t, cond).to(x).flatten(1)).squeeze(1)
