"""Solvers of the probability-flow ODE, for evaluation: deterministic, so no policies.

    (1)  dx/dt = v(x, t) = alpha' x0_hat + sigma' eps_hat    (handbook 2.7)
    (2)  Euler:  x_s = x + (s - t) v(x, t)            Heun:  x_s = x + (s - t) (v(x, t) + v(x_Euler, s)) / 2
    (3)  in u = sigma / alpha, z = x / alpha:  dz/du = eps_hat. Heun there is EDM's sampler (Karras et al. 2022,
         Alg. 1); Euler there is the kernel DDIM(0).

Times may fall (sampling) or rise (data to noise), where the schedule and the kind are defined at the ends.
Heun's second evaluation is left out where clean data is reached: a kind need not be defined there.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond, cast
from rlfusion.diffusion.denoiser import Denoising
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.schedule import Level, level

OneStep = Callable[[Denoising, Tensor, Tensor, Tensor, Cond], Tensor]
"""(denoiser, x (B, ...), t (), s (), cond) -> x at s."""


def velocity(p: Prediction, l: Level) -> Tensor:
    """v of Eq. (1), (B, ...).

    Raises:
        ConfigError: the path has no finite velocity at this level (a VP table or Cosine at t = 0).
    """
    if l.d_sigma.device.type == "cpu" and not bool(l.d_sigma.isfinite().all()):
        raise ConfigError("the path's velocity is infinite at clean data: expected times > 0, or a flow schedule")
    return cast(l.d_alpha, p.x0) * p.x0 + cast(l.d_sigma, p.eps) * p.eps


def euler(denoiser: Denoising, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """Eq. (2), Euler: one network call, first order."""
    return x + float(s - t) * velocity(denoiser(x, t, cond), level(denoiser.schedule, t, x))


def heun(denoiser: Denoising, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """Eq. (2), Heun: two network calls, second order; Euler's step to sigma_s = 0."""
    to = level(denoiser.schedule, s, x)
    v = velocity(denoiser(x, t, cond), level(denoiser.schedule, t, x))
    guess = x + float(s - t) * v
    if to.sigma == 0:
        return guess
    return x + float(s - t) * (v + velocity(denoiser(guess, s, cond), to)) / 2


def edm_heun(denoiser: Denoising, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """Eq. (3), Heun in sigma / alpha: two network calls, second order; DDIM(0) to sigma_s = 0.

    Raises:
        ConfigError: alpha = 0 at t or s, where sigma / alpha is infinite.
    """
    at, to = level(denoiser.schedule, t, x), level(denoiser.schedule, s, x)
    if at.alpha == 0 or to.alpha == 0:
        raise ConfigError("sigma / alpha is infinite where alpha = 0: expected a schedule with signal at t = 1")
    gap, ratio = to.sigma - to.alpha / at.alpha * at.sigma, cast(to.alpha / at.alpha, x)  # alpha_s (u_s - u_t)
    eps = denoiser(x, t, cond).eps
    guess = ratio * x + cast(gap, x) * eps
    if to.sigma == 0:
        return guess
    return ratio * x + cast(gap, x) * (eps + denoiser(guess, s, cond).eps) / 2


def solve(step: OneStep, denoiser: Denoising, x: Tensor, times: Tensor, cond: Cond = None) -> Iterator[Tensor]:
    """Yield x at ``times``[1], ..., ``times``[K], lazily, from ``x`` (B, ...) at ``times``[0]; times (K+1,) float64.

    Sampling starts from x = sigma(times[0]) z. Gradients flow unless the caller forbids them.
    """
    for t, s in pairwise(times):
        x = step(denoiser, x, t, s, cond)
        yield x


@torch.no_grad()
def end(step: OneStep, denoiser: Denoising, x: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """The last x of ``solve``, without gradients."""
    for state in solve(step, denoiser, x, times, cond):
        x = state
    return x
