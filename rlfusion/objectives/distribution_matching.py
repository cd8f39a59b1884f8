"""Moving a generator's samples towards a teacher's law: SDS, VSD, DMD and ADD are one direction (handbook 3.2.2-3.2.5).

A generator x = G_theta(z) is noised, x_t = alpha x + sigma eps, and the gradient of a KL at noise level t reaches it
through the two denoisers of x_t alone, both constants (errata 63-69):

    (1)  grad_x KL_t = alpha (s_fake - s_real)(x_t) = (alpha / sigma)^2 (x0_fake - x0_real)
    (2)  direction   = w (x0_fake - x0_real),      what descent follows;      e_real - e_fake = (alpha / sigma)(same)

    x0_fake = the denoiser of the generator's own law        VSD, DMD: (x, law) -> the teacher's law
    x0_fake = x itself                                       SDS and ADD's distillation: e_real - eps; the entropy of
                                                             the generator is left out, so it ends at modes

with the weights w

    (3)  KL:         (alpha / sigma)^2, Eq. (1)
    (4)  Eps:        alpha sigma, that is sigma^2 on e_real - e_fake                  (DreamFusion, ProlificDreamer)
    (5)  Alpha:      alpha                                                            (ADD, exponential weighting)
    (6)  Normalized: 1 / mean |x - x0_real| of each sample                                               (DMD, DMD2)

and a surrogate whose gradient in x is the direction over the number of features d:

    (7)  L = 1/2 mean |x - sg(x - direction)|^2
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlfusion.common.tensors import cast, mean_features
from rlfusion.diffusion.schedule import Level


class MatchingWeight(Protocol):
    """A frozen dataclass: w of Eq. (2), broadcasting over x0, from the level and the sample and its x0_real."""

    def __call__(self, l: Level, x: Tensor, real: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class KL:
    """Eq. (3). Grows without bound as the noise falls: leave a margin."""

    def __call__(self, l: Level, x: Tensor, real: Tensor) -> Tensor:
        return cast((l.alpha / l.sigma).square(), x)


@dataclass(frozen=True)
class Eps:
    """Eq. (4)."""

    def __call__(self, l: Level, x: Tensor, real: Tensor) -> Tensor:
        return cast(l.alpha * l.sigma, x)


@dataclass(frozen=True)
class Alpha:
    """Eq. (5)."""

    def __call__(self, l: Level, x: Tensor, real: Tensor) -> Tensor:
        return cast(l.alpha, x)


@dataclass(frozen=True)
class Normalized:
    """Eq. (6). A sample that is its own x0_real everywhere has no direction: 0, not 0/0."""

    def __call__(self, l: Level, x: Tensor, real: Tensor) -> Tensor:
        size = mean_features((x - real).abs()).reshape(-1, *[1] * (x.ndim - 1))
        return (1 / size).masked_fill(size == 0, 0.0)


MATCHING: Mapping[str, Callable[..., MatchingWeight]] = {cls.__name__: cls for cls in (KL, Eps, Alpha, Normalized)}


def pull(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """Eq. (7), (B,), for the direction of Eq. (2); all (B, *), ``weight`` broadcasting. Only x has a gradient.

    Raises:
        ValueError: x, fake and real differ in shape.
    """
    if not x.shape == fake.shape == real.shape:
        raise ValueError(f"expected one shape: got {[tuple(a.shape) for a in (x, fake, real)]}")
    goal = (x - weight * (fake - real)).detach()
    return 0.5 * mean_features((x - goal).square())
