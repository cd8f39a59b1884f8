"""Kernels that are one Euler-Maruyama step of a stochastic differential equation, dt = s - t < 0.

With the drift (alpha'/alpha) x and the diffusion g^2 = 2 sigma sigma' - 2 (alpha'/alpha) sigma^2 of a path, the SDE

    (6)  dx = [alpha' x0_hat + sigma' eps_hat + noise^2 g^2 eps_hat / (2 sigma)] dt + noise g dw

has the path's marginals for every noise: 0 is the probability-flow ODE, 1 the time reversal (Anderson 1982). Hence
A = alpha_t + alpha_t' dt,  B = sigma_t + (sigma_t' + noise^2 g^2 / (2 sigma_t)) dt,  S = noise g sqrt(-dt).

    (7)  Flow-GRPO (Liu et al. 2025) takes noise^2 sigma / alpha for noise^2 g^2 (which is 2 sigma / alpha there)
    (8)  Langevin at one level, score = -eps / sigma, d = step sigma_t^2:  x + d score / 2 + sqrt(d) z, that is
         A = alpha_t,  B = sigma_t (1 - step / 2),  S = sigma_t sqrt(step)          (handbook 2.2.3, erratum 27)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.kernel.base import Coefficients
from rlfusion.diffusion.schedule import Level


def _euler_maruyama(t: Level, s: Level, dt: Tensor, g2: Tensor) -> Coefficients:
    """The step with noise^2 g^2 = ``g2``; to clean data it is x0_hat."""
    last = s.sigma == 0
    a = torch.where(last, s.alpha, t.alpha + t.d_alpha * dt)
    b = torch.where(last, 0.0, t.sigma + (t.d_sigma + g2 / (2 * t.sigma)) * dt)
    return Coefficients(a, b, torch.where(last, 0.0, (g2 * -dt).sqrt()))


def _check_noise(noise: float) -> None:
    if not 0 <= noise < math.inf:
        raise ConfigError(f"noise = {noise}: expected a finite number >= 0")


@dataclass(frozen=True)
class FlowSDE:
    """The stochastic flow sampler of Flow-GRPO, Eq. (7), for any schedule with alpha > 0 below t = 1.

    At t = 1, where alpha = 0, the noise scale uses alpha_s, as the released code does. ``noise`` = 0 is the Euler step
    of the flow ODE.
    """

    noise: float = 0.7

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        alpha = torch.where(t.alpha > 0, t.alpha, s.alpha)
        return _euler_maruyama(t, s, dt, self.noise**2 * t.sigma / alpha)


@dataclass(frozen=True)
class ReverseSDE:
    """The reverse SDE of the schedule's own path (Song et al. 2021; handbook Eq. 2, 3), Eq. (6): VP, VE and others.

    Where alpha = 0 (zero terminal SNR, flows at t = 1) g is infinite and the step is refused.
    """

    noise: float = 1.0

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        if t.alpha.device.type == "cpu" and bool((t.alpha == 0).any()):
            raise ConfigError("ReverseSDE: alpha = 0 at t = 1: expected a schedule with signal there, or FlowSDE")
        g2 = 2 * t.sigma * (t.d_sigma - t.d_alpha / t.alpha * t.sigma)
        return _euler_maruyama(t, s, dt, self.noise**2 * g2)


@dataclass(frozen=True)
class Langevin:
    """Annealed Langevin dynamics (SMLD, Song & Ermon 2019, Alg. 1), Eq. (8), on a variance-exploding schedule.

    A step moves at the noise level t; the next takes x as it is at level s. For n moves at each level give the chain
    ``grid.repeated(times, n)``. ``step`` = d_i / sigma_i^2 (their epsilon / sigma_L^2) lies in (0, 4): beyond, the
    moves diverge. Within, the stationary variance at a level is V / (1 - d / (4 V)) for Gaussian x of variance V.
    """

    step: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.step < 4:
            raise ConfigError(f"step = {self.step}: expected 0 < step < 4")

    @property
    def stochastic(self) -> bool:
        return True

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        if t.alpha.device.type == "cpu" and bool((t.alpha != s.alpha).any()):
            raise ConfigError("Langevin: alpha changes with time: expected a schedule such as Karras() or Geometric()")
        return Coefficients(t.alpha, t.sigma * (1 - self.step / 2), t.sigma * math.sqrt(self.step))
