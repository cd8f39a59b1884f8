"""The Gaussian of a transition.

(1)  log N(x; m, s^2 I) = sum_d [ -(x - m)^2 / (2 s^2) - log s - log(2 pi) / 2 ]          (a sum, not a mean)
     d log N / dm = (x - m) / s^2 = -d log N / dx,   d log N / ds = sum_d [ ((x - m) / s)^2 - 1 ] / s
(2)  KL(N(m1, s1^2) || N(m2, s2^2)) = sum_d [ (s1^2 + (m1 - m2)^2) / s2^2 - 1 - log(s1^2 / s2^2) ] / 2
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlfusion.common.tensors import sum_features


class Gaussian(NamedTuple):
    """N(mean, std^2 I): mean (B, ...), std () or (B, 1, ..., 1). std = 0 is a point mass: it has no density."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with ``noise`` standard normal (B, ...); differentiable in mean and std."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Eq. (1), (B,), in float32 or better. A point mass (std = 0) answers NaN: it has no density."""
        x, mean, std = map(_at_least_float32, (x, self.mean, self.std))
        if not (torch.is_grad_enabled() and (x.requires_grad or mean.requires_grad or std.requires_grad)):
            return _summed((x - mean) / std, std)  # a node of a graph takes as long as the operations in it
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, (x, mean, std))):
            return _summed((x - mean) / std, std)  # which asks for rules of its own of such a node
        found: Tensor = _LogProb.apply(x, mean, std)
        return found

    def kl(self, other: "Gaussian") -> Tensor:
        """Eq. (2), KL(self || other), (B,). Where both have one std, in one tensor, it is |m1 - m2|^2 / (2 s^2), which
        keeps the bits of a small gap.
        """
        gap, v1 = _at_least_float32(self.mean) - _at_least_float32(other.mean), _at_least_float32(self.std).square()
        if self.std is other.std:
            return sum_features(gap.square()) / (2 * (v1.flatten() if v1.ndim else v1))
        v2 = _at_least_float32(other.std).square()
        return sum_features((gap.square() + v1) / v2 - 1 - (v1 / v2).log()) / 2

    def entropy(self) -> Tensor:
        """sum_d [ log s + (1 + log 2 pi) / 2 ], (B,)."""
        return sum_features((self.std.log() + (1 + math.log(2 * math.pi)) / 2).expand_as(self.mean))


class _LogProb(torch.autograd.Function):
    """Eq. (1) of x and mean (B, ...), and its gradient by itself, in fewer operations than a graph of its parts; that
    of x and mean to the same bits. Gradients of it are those of these operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        z = (x - mean) / std
        ctx.save_for_backward(x, mean, std, z)
        return _summed(z, std)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, mean, std, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient will be asked for
            z = (x - mean) / std
        slope = slope.reshape(-1, *[1] * (z.ndim - 1))
        of_x, of_mean, of_std = ctx.needs_input_grad
        towards = (slope * z).div_(std) if of_x or of_mean else None
        widened = (slope * (z.square() - 1) / std).sum_to_size(std.shape) if of_std else None
        return -towards if of_x and towards is not None else None, towards if of_mean else None, widened


def _summed(z: Tensor, std: Tensor) -> Tensor:
    """Eq. (1) of z = (x - m) / s."""
    return sum_features(torch.sub(_log_peak(std), z.square(), alpha=0.5))


def _log_peak(std: Tensor) -> Tensor:
    """-log s - log(2 pi) / 2; inf where s = 0, and this - z^2 / 2 is NaN, whether z is infinite or 0 / 0."""
    if std.ndim == 0 and std.device.type == "cpu":
        return _log_peak_of(std.item(), std.dtype)
    return -math.log(2 * math.pi) / 2 - std.log()


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _log_peak_of(std: float, dtype: torch.dtype) -> Tensor:
    """That of a step that a whole batch takes: the same few in every rollout."""
    return _log_peak(torch.tensor([std], dtype=dtype))[0]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.itemsize >= 4 else x.float()
