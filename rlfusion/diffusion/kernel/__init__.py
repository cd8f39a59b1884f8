"""Kernels: reverse transitions t -> s as three numbers, p(x_s | x_t) = N(A x0_hat + B eps_hat, S^2 I)."""

from rlfusion.diffusion.kernel.base import Coefficients, Kernel, applied, apply, transition
from rlfusion.diffusion.kernel.last_step_noise import LastStepNoise
from rlfusion.diffusion.kernel.marginal import CPS, DDIM, DDPM, Renoise
from rlfusion.diffusion.kernel.sde import FlowSDE, Langevin, ReverseSDE

__all__ = [
    "CPS",
    "DDIM",
    "DDPM",
    "Coefficients",
    "FlowSDE",
    "Kernel",
    "Langevin",
    "LastStepNoise",
    "Renoise",
    "ReverseSDE",
    "applied",
    "apply",
    "transition",
]
