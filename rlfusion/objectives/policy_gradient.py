"""Policy-gradient losses of single transitions (handbook 3.3.2, corrected; Black et al. 2023; Schulman et al. 2017).

    (1)  score function (DDPO_SF):       loss = -log p_theta(x_s | x_t) A
    (2)  importance sampling (DDPO_IS):  loss = -min(r A, clip(r, 1 - c, 1 + c) A),   r = p_theta / p_old

         the range may be lopsided, clip(r, 1 - c_low, 1 + c_high) (Yu et al. 2025)
    (3)  dual clip (Ye et al. 2020):     r is held below c2 > 1 + c, which bounds the loss where A < 0
    (4)  decoupled (Hilton et al. 2022; Fu et al. 2025, AReaL), for walks of an older policy p_old: the clip holds the
         policy to p_prox, the one with which the update began, and the loss has the weight of p_prox against p_old,

         loss = w (2) or (3) with r = p_theta / p_prox,   w = min(p_prox / p_old, m), a constant

    (5)  masked by divergence (Qi et al. 2026, DPPO; Flow-DPPO), in the place of the clip of (2): loss = -r A, without a
         gradient where D(p_theta || p_old) > limit and the step leads farther away, (r - 1) A > 0

A is a constant: no gradient flows into it. At theta = theta_old both have the gradient -A grad log p_theta.
"""

import math
from typing import Any

import torch
from torch import Tensor


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(s) != 1 for s in shapes.values()):
        raise ValueError(f"expected (N,) each: got {shapes}")


def score_function(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """Eq. (1), (N,)."""
    _same_shape(log_prob=log_prob, advantage=advantage)
    return -log_prob * advantage.detach()


def behaviour_weight(log_weight: Tensor, limit: float) -> Tensor:
    """w of Eq. (4) from log p_prox - log p_old, and m; truncating it bounds its variance for some bias."""
    return log_weight.detach().exp().clamp(max=limit)


def effective_share(log_weight: Tensor) -> Tensor:
    """The effective sample size over the number of samples, (sum w)^2 / (N sum w^2) in (0, 1], of log weights (N,)."""
    weight = (log_weight.double() - log_weight.max()).exp()
    return weight.mean().square() / weight.square().mean()


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, clip: float | tuple[float, float], dual_clip: float | None = None
) -> Tensor:
    """Eq. (2), and (3) where ``dual_clip`` is given, (N,), from log r = log p_theta - log p_old; ``clip`` is c or
    (c_low, c_high).
    """
    _same_shape(log_ratio=log_ratio, advantage=advantage)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    most = math.inf if dual_clip is None else math.log(dual_clip)
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, (log_ratio, advantage))):
        ratio = log_ratio.clamp(max=most).exp()  # torch.func asks for rules of its own of a node
        return -(ratio * advantage).minimum(ratio.clamp(1 - low, 1 + high) * advantage)
    found: Tensor = _Clipped.apply(log_ratio, advantage, 1 - low, 1 + high, most)
    return found


class _Clipped(torch.autograd.Function):
    """Eq. (2) and (3) of log r and A, r in [low, high], log r <= ``most``; its slope in log r is -r A where the minimum
    is not what the clip holds: in fewer operations than a graph of the parts, and to the same bits but where r is a
    limit itself, which does not hold it: there a graph's slope is a matter of torch's own.
    """

    @staticmethod
    def forward(ctx: Any, log_ratio: Tensor, advantage: Tensor, low: float, high: float, most: float) -> Tensor:
        ratio, ctx.most = log_ratio.clamp(max=most).exp(), most
        clipped = ratio.clamp(low, high)
        own, held = ratio * advantage, clipped * advantage
        free = ((ratio == clipped) | (own < held)) & (log_ratio <= most)
        ctx.save_for_backward(log_ratio, ratio, advantage * free)
        return own.minimum(held).neg_()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        log_ratio, ratio, advantage = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient will be asked for
            ratio = log_ratio.clamp(max=ctx.most).exp()
        return -slope * advantage * ratio, None, None, None, None


def masked_surrogate(
    log_ratio: Tensor, advantage: Tensor, divergence: Tensor, limit: float, dual_clip: float | None = None
) -> Tensor:
    """Eq. (5), (N,), r held by Eq. (3) where ``dual_clip`` is given; ``divergence`` is D, a constant."""
    _same_shape(log_ratio=log_ratio, advantage=advantage, divergence=divergence)
    held = log_ratio if dual_clip is None else log_ratio.clamp(max=math.log(dual_clip))
    loss = -held.exp() * advantage.detach()
    return torch.where(leads_away(log_ratio, advantage, divergence, limit), loss.detach(), loss)


def leads_away(log_ratio: Tensor, advantage: Tensor, divergence: Tensor, limit: float) -> Tensor:
    """Where Eq. (5) has no gradient, bool (N,)."""
    return (divergence.detach() > limit) & (log_ratio.detach() * advantage.detach() > 0)
