"""Reverse transitions t -> s as three numbers (A, B, S) of the schedule alone:

    (1)  p(x_s | x_t) = N(A x0_hat + B eps_hat, S^2 I).

A kernel with A = alpha_s and B^2 + S^2 = sigma_s^2 keeps the marginals of ``schedule`` when (x0, eps) are exact.
Where sigma_s = 0 a kernel returns x0_hat itself (A = alpha_s, B = S = 0): the last step is deterministic.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from rlfusion.common.tensors import cast
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.schedule import Level


class Coefficients(NamedTuple):
    """A, B and S of Eq. (1), float64, shaped as the levels are."""

    x0: Tensor
    eps: Tensor
    std: Tensor


class Kernel(Protocol):
    """A frozen dataclass that gives the coefficients of the step from level ``t`` to ``s``, ``dt`` = s - t < 0."""

    @property
    def stochastic(self) -> bool:
        """False if S = 0 at every step: such a kernel has no log-probability and trains no policy gradient."""

    def coefficients(self, t: Level, s: Level, dt: Tensor) -> Coefficients:
        """A, B and S of the step, float64, shaped as the levels."""

    def __hash__(self) -> int: ...


def transition(kernel: Kernel, p: Prediction, t: Level, s: Level, dt: Tensor) -> Gaussian:
    """Eq. (1), with the kernel's coefficients of the step."""
    return apply(kernel.coefficients(t, s, dt), p)


def apply(coefficients: Coefficients, p: Prediction) -> Gaussian:
    """Eq. (1). Coefficients are float64, and are cast to the prediction's dtype and device here, last."""
    return applied(Coefficients(*(cast(c, p.x0) for c in coefficients)), p)


def applied(c: Coefficients, p: Prediction) -> Gaussian:
    """The same of coefficients that are cast already."""
    return Gaussian(c.x0 * p.x0 + c.eps * p.eps, c.std)
