"""Score matching (handbook 2.2.2): explicit, implicit and sliced, on data noised as for denoising.

    (1)  psi(x, t, c) = -e / sigma,  e = eps_theta(x, t, c) of a network of any kind;   s = grad log q_t(x | c)
    (2)  ESM = E w |psi - s|^2                                                            (Hyvarinen 2005, Eq. 2)
         q_t = mean_i N(alpha x_i, sigma^2 I), the training samples noised:  s = -(x - alpha E[x0 | x]) / sigma^2,
         E[x0 | x] = sum_i p_i x_i,  p = softmax_i(-|x - alpha x_i|^2 / (2 sigma^2))
    (3)  ISM = E w (|psi|^2 + 2 tr(d psi / dx)) = ESM - E w |s|^2                         (Hyvarinen 2005, Eq. 4)
    (4)  tr(J) = E v^T J v  for  E v v^T = I                                              (Hutchinson 1990)
    (5)  SSM = E w ((v . psi)^2 + 2 v^T (d psi / dx) v); reduced: |psi|^2 comes first     (Song et al. 2019, Eq. 7-9)
    (6)  DSM = E w |psi + eps / sigma|^2 = ESM + const                                    (Vincent 2011): ``Denoising``

All have the gradient of (2) in expectation, in the units of ``denoising``: the mean over features, with a weight on the
network's own error. (ISM and SSM are twice Hyvarinen's, and below 0 at the optimum.) In e, with w / sigma^2 the weight
of the eps error, (3) is E (w / sigma^2) (|e|^2 - 2 sigma tr(de / dx)).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import cast, mean_features, sum_features
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.nets.parts import plain_attention
from rlfusion.pretrain.base import Draw
from rlfusion.pretrain.denoising import NoisedLoss


@dataclass(frozen=True)
class ESM(NoisedLoss):
    """Eq. (2): denoising whose target is the mean of its target over the training samples that x_t may come from.

    Attributes:
        reference: training samples that q_t is made of, drawn anew each step beside the batch's own; 0 for all, which
            is exact. (Fewer is biased: the stable target field of Xu et al. 2023.)
    """

    compares_data: ClassVar[bool] = True

    reference: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "reference")

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        at = self.noised(draw, denoiser.schedule)
        data, label = self._among(draw)
        alpha, sigma = (c.flatten().to(at.x.device) for c in (at.l.alpha, at.l.sigma))
        x0 = posterior_mean(at.x, data, alpha, sigma, of_condition(draw, label))
        eps = (at.x.double() - at.l.alpha.to(at.x.device) * x0) / at.l.sigma.to(at.x.device)
        return self.regress(denoiser, draw, at, x0.to(at.x), eps.to(at.x))

    def _among(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Samples (N, *) and their labels (N,) that q_t is made of."""
        if not 0 < self.reference < len(draw.data):
            return draw.data, draw.label
        batch = draw.batch  # the samples of all of it are among them, in each of its parts
        index = stream(*batch.key, "reference").choice(len(draw.data), self.reference, replace=False)
        at = torch.cat([batch.index, torch.from_numpy(index).to(draw.index.device)]).unique()
        return draw.data[at], draw.label[at]


def of_condition(draw: Draw, label: Tensor) -> Tensor:
    """Which of the samples of ``label`` (N,) are of each row's condition (B,), bool (B, N); all are of no class."""
    return (draw.cond[:, None] == label) | (draw.cond == draw.no_class)[:, None]


def posterior_mean(x: Tensor, data: Tensor, alpha: Tensor, sigma: Tensor, allowed: Tensor) -> Tensor:
    """E[x0 | x] of Eq. (2), (B, *), float64: x (B, *), data (N, *), alpha and sigma (B,), allowed (B, N).

    In float64: at small sigma the exponents are large and their differences are what counts.
    """
    points, rows = data.flatten(1).double(), x.flatten(1).double()
    across = rows @ points.T * alpha[:, None] - alpha.square()[:, None] * points.square().sum(1) / 2
    p = (across / sigma.square()[:, None]).masked_fill(~allowed, -math.inf).softmax(1)
    return (p @ points).reshape(x.shape)


@dataclass(frozen=True)
class ISM(NoisedLoss):
    """Eq. (3).

    Attributes:
        probes: Rademacher vectors of Eq. (4) a sample; 0 for the exact trace, with one backward pass a feature.
    """

    second_order: ClassVar[bool] = True

    probes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "probes")

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        slices = _slices(draw, self.probes) if self.probes else _basis(draw.x0)
        curve, e, factor = _curvature(self, denoiser, draw, slices)
        trace = curve.mean(0) if self.probes else curve.sum(0)
        return factor * (mean_features(e.square()) - 2 * trace / e[0].numel())


@dataclass(frozen=True)
class SSM(NoisedLoss):
    """Eq. (5) with Rademacher slices.

    Attributes:
        probes: slices of each sample.
        reduced: |psi|^2 in the place of (v . psi)^2: less variance, the same mean.
    """

    second_order: ClassVar[bool] = True

    probes: int = 1
    reduced: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1:
            raise ConfigError(f"probes = {self.probes}: expected at least 1")

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        v = _slices(draw, self.probes)
        curve, e, factor = _curvature(self, denoiser, draw, v)
        first = sum_features(e.square()) if self.reduced else (v * e).flatten(2).sum(2).square().mean(0)
        return factor * (first - 2 * curve.mean(0)) / e[0].numel()


def _slices(draw: Draw, probes: int) -> Tensor:
    """Rademacher vectors (P, B, *): E v v^T = I and v^T v = d."""
    normal = draw.normal("slices", probes, *draw.x0.shape, of=1).to(draw.x0)
    return torch.where(normal >= 0, 1.0, -1.0).to(draw.x0)


def _basis(x: Tensor) -> Tensor:
    """The unit vectors of all d features, for every row: (d, B, *)."""
    eye = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    return eye[:, None].expand(-1, len(x), -1).reshape(-1, *x.shape)


def _curvature(loss: NoisedLoss, denoiser: Denoiser, draw: Draw, slices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma v^T (de / dx) v of each slice, (P, B); e (B, *); and the weight of the eps error, (B,)."""
    at = loss.noised(draw, denoiser.schedule)
    x = at.x.detach().requires_grad_()
    with plain_attention():
        e = denoiser(x, at.t, draw.cond).eps
        pulled = [sum_features(v * torch.autograd.grad((v * e).sum(), x, create_graph=True)[0]) for v in slices]
    return cast(at.l.sigma.flatten(), x) * torch.stack(pulled), e, cast(loss.eps_weight(denoiser, at.l), x)
