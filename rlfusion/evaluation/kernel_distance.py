"""The kernel distance of two sets of features (Binkowski et al. 2018), KID where these are Inception's.

    (1)  k(x, y) = (x . y / F + 1)^3
    (2)  d = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

It is unbiased: of two sets of one law its mean is 0 for any number of samples, and it may be below. The usual codes
take the mean of (2) over random subsets of 1,000; of all pairs at once it has the same mean and less noise.
"""

from torch import Tensor

from rlfusion.common.errors import ConfigError, NumericalError

CHUNK = 4096
"""Rows of a matrix of pairs that are held at a time."""


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Features (N, F) and (M, F) -> (2), in float64.

    Raises:
        ConfigError: not two sets (N, F), (M, F) of two or more features.
        NumericalError: a feature is not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ConfigError(
            f"features of shape {tuple(a.shape)} and {tuple(b.shape)}: expected (N, F), (M, F), N, M >= 2"
        )
    a, b = a.double(), b.double()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise NumericalError("features are not finite")
    return _within(a) + _within(b) - 2 * (_sum(a, b) / (len(a) * len(b)))


def _within(x: Tensor) -> float:
    """The mean over pairs of two different samples."""
    own = _kernel((x * x).sum(1) / x.shape[1]).sum().item()
    return (_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _sum(a: Tensor, b: Tensor) -> float:
    return sum(_kernel(part @ b.T / a.shape[1]).sum().item() for part in a.split(CHUNK))


def _kernel(product: Tensor) -> Tensor:
    return (product + 1) ** 3
