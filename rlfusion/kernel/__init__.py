"""Kernels: reverse transitions t -> s as three numbers, p(x_s | x_t) = N(A x0_hat + B eps_hat, S^2 I)."""

from rlfusion.kernel.base import Coefficients, Kernel, apply, transition
from rlfusion.kernel.ended import Ended
from rlfusion.kernel.marginal import CPS, DDIM, DDPM, Renoise
from rlfusion.kernel.sde import FlowSDE, Langevin, ReverseSDE

__all__ = [
    "CPS",
    "DDIM",
    "DDPM",
    "Coefficients",
    "Ended",
    "FlowSDE",
    "Kernel",
    "Langevin",
    "Renoise",
    "ReverseSDE",
    "apply",
    "transition",
]
