"""A few-step generator: a student's own chain, with gradients through one of its network calls.

(1)  k ~ U{0, .., K-1} for every sample, of the K steps t_0 > .. > t_{K-1} > 0 of the student's chain
(2)  x_k:  "simulated", by the student's own chain from noise to step k, without gradients: what it will meet when it
     samples (DMD2's backward simulation);  "data", alpha x_0 + sigma eps of a real sample (ADD)
(3)  G = x0_hat(x_k, t_k, c).    K = 1:  G(z) = x0_hat(sigma(1) z, 1, c)
"""

from typing import Literal

import torch
from torch import Tensor

from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.objectives.renoise import noised
from rlfusion.pretrain import Draw

Inputs = Literal["simulated", "data"]


class Generator:
    """Eq. (1) to (3) of a student ``policy`` over the falling ``times`` (K+1,)."""

    def __init__(self, policy: Policy, times: Tensor, inputs: Inputs = "simulated") -> None:
        self.policy, self.times, self.inputs = policy, times, inputs

    @property
    def steps(self) -> int:
        """K."""
        return len(self.times) - 1

    def __call__(self, draw: Draw) -> Tensor:
        """G (B, *) for the conditions of a draw, with the student's gradient; pure in the draw's key."""
        return self.at(draw, self.drawn(draw))

    def drawn(self, draw: Draw) -> Tensor:
        """Eq. (1): k (B,) int64, on the CPU."""
        return draw.drawn("generator step", lambda random, count: random.integers(0, self.steps, count))

    def at(self, draw: Draw, k: Tensor) -> Tensor:
        """G from the steps k (B,) int64, on the CPU."""
        make = self._simulated if self.inputs == "simulated" else self._of_data
        return self.policy.denoiser(make(draw, k), self.times[k], draw.cond).x0

    @torch.no_grad()
    def _simulated(self, draw: Draw, k: Tensor) -> Tensor:
        noise = draw.normal("generator noise", *draw.x0.shape[:1], self.steps, *draw.x0.shape[1:])
        x = noise[:, 0] * self.policy.prior_std(self.times)
        last = int(k.max()) if draw.whole is None else self.steps - 1  # all ranks call the network as often
        for n in range(last):
            obs = Observation(x, self.times[n], self.times[n + 1], draw.cond)
            goes_on = (k > n).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
            x = torch.where(goes_on, self.policy(obs).sample(noise[:, n + 1]), x)
        return x

    def _of_data(self, draw: Draw, k: Tensor) -> Tensor:
        eps = draw.normal("generator noise", *draw.x0.shape)
        return noised(draw.x0, eps, self.times[k], self.policy.schedule)
