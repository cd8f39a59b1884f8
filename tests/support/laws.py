"""A mixture's exact denoiser with the call of a ``Denoiser``, and the steps of a policy as numbers."""

from itertools import pairwise

import oracles
import torch

from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import level


class Oracle(torch.nn.Module):
    """A mixture's exact denoiser with the call of a ``Denoiser``."""

    def __init__(self, law: oracles.Mixture, schedule):
        super().__init__()
        self.law, self.schedule = law, schedule

    def forward(self, x, t, cond=None):
        at = level(self.schedule, t, x)
        flat, a, b = x.flatten(1).double().numpy(), float(at.alpha), float(at.sigma)
        return Prediction(
            *(torch.from_numpy(f(flat, a, b)).reshape(x.shape).to(x) for f in (self.law.x0, self.law.eps))
        )


def steps_of(policy: Policy, times) -> list[oracles.Step]:
    """(a, b, A, B, S) of every step, as the kernel gives them (test_kernel checks them)."""
    chain = []
    for t, s in pairwise(times):
        at, to = policy.schedule(t), policy.schedule(s)
        chain.append(tuple(float(v) for v in (at.alpha, at.sigma, *policy.kernel.coefficients(at, to, s - t))))
    return chain
