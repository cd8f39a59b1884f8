"""The Frechet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017, Eq. 6).

    d = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

C_a^1/2 C_b C_a^1/2 is symmetric, so both roots come from eigendecompositions in float64 (a root of C_a C_b need not be
real in floating point). Covariances are unbiased. The distance of finite samples of one law is above 0, and more so the
smaller they are: read it beside a floor, real against real. torchmetrics and torch-fidelity offer the same for
Inception features, which mean nothing for 8x8 digits; on our judge's features it is these few lines.
"""

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, NumericalError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Features (N, F) and (M, F) -> the distance, at least 0.

    Raises:
        ConfigError: not two sets (N, F), (M, F) of two or more features.
        NumericalError: a feature is not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ConfigError(
            f"features of shape {tuple(a.shape)} and {tuple(b.shape)}: expected (N, F), (M, F), N, M >= 2"
        )
    return frechet_gaussian(*moments(a), *moments(b))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, F) -> mean (F,) and unbiased covariance (F, F), float64.

    Raises:
        NumericalError: a feature is not finite; names the first such row.
    """
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NumericalError(f"features of {len(bad)} of {len(features)} samples are not finite, first of row {bad[0]}")
    x = features.double()
    return x.mean(0), x.T.cov().reshape(x.shape[1], x.shape[1])


def frechet_gaussian(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The distance between N(mean_a, cov_a) and N(mean_b, cov_b); means (F,), covariances (F, F)."""
    half = symmetric_root(cov_a)
    cross = symmetric_root(half @ cov_b @ half).trace()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def symmetric_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semidefinite (F, F); eigenvalues below 0 by rounding count as 0."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
