"""Losses of a discriminator D and a generator, on logits of real and generated samples (handbook 3.2.4, 3.2.5).

(1)  non-saturating (DMD2):  D: softplus(-D(real)) + softplus(D(fake)),          G: softplus(-D(fake))
     = -log p(real) - log(1 - p(fake)), bounded below by 0: at D* = log p_r / p_f the D loss is log 4 - 2 JS
     (errata 70, 71: as printed it has no minimum)
(2)  hinge (ADD):  D: max(0, 1 - D(real)) + max(0, 1 + D(fake)),                 G: -D(fake);  least 2 (1 - TV)
(3)  R1 (Mescheder et al. 2018):  |grad_x D(x)|^2 on real samples, summed over features
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rlfusion.common.tensors import sum_features


class Adversarial(NamedTuple):
    """A pair of losses: ``discriminator(real, fake)`` and ``generator(fake)``, logits (B,) to losses (B,)."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _nonsaturating(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real) + F.softplus(fake)


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1 - real) + F.relu(1 + fake)


ADVERSARIAL: Mapping[str, Adversarial] = {
    "nonsaturating": Adversarial(_nonsaturating, lambda fake: F.softplus(-fake)),
    "hinge": Adversarial(_hinge, lambda fake: -fake),
}
"""Eq. (1) and (2)."""


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """Eq. (3), (B,), of logits (B,) made from x (B, *), which must require gradients; itself differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return sum_features(gradient.square())
