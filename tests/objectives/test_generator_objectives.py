"""Objectives of generators against Gaussians, expectations by quadrature in float64.

Teacher N(m, lam), generator G = mu + tau z: with V1 = a^2 tau^2 + b^2 and V2 = a^2 lam + b^2 the gradient of KL_t is
a^2 (mu - m) / V2 in mu and a^2 tau (1 / V2 - 1 / V1) in tau; SDS drops 1 / V1 (handbook notes, section 3).
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from rlfusion.diffusion.schedule import Level
from rlfusion.objectives import ADVERSARIAL, MATCHING, gradient_penalty, pull

M, LAM, MU, TAU = 0.7, 0.25, -0.4, 0.8
LEVELS = [(0.9, math.sqrt(1 - 0.81)), (0.3, math.sqrt(1 - 0.09)), (0.5, 0.5), (1.0, 3.0)]


def level_of(a: float, b: float) -> Level:
    return Level(*(torch.tensor(v, dtype=torch.float64) for v in (a, b, 0.0, 0.0)))


def quadrature(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z, eps (n^2,) of two standard normals, and their weights."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    w = w / w.sum()
    z, eps = np.meshgrid(x, x)
    return tuple(torch.from_numpy(a.ravel()) for a in (z, eps, np.outer(w, w)))


def best(x: Tensor, a: float, b: float, m: float, lam: float) -> Tensor:
    """E[x0 | x_t] of N(m, lam)."""
    return m + a * lam * (x - a * m) / (a**2 * lam + b**2)


def gradient(a: float, b: float, weight: str, sds: bool) -> tuple[float, float]:
    """The gradient of the expected surrogate in (mu, tau)."""
    z, eps, w = quadrature()
    theta = torch.tensor([MU, TAU], dtype=torch.float64, requires_grad=True)
    x = (theta[0] + theta[1] * z)[:, None]
    with torch.no_grad():
        x_t = a * x + b * eps[:, None]
        real = best(x_t, a, b, M, LAM)
        fake = x.detach() if sds else best(x_t, a, b, MU, TAU**2)
    loss = (w * pull(x, fake, real, MATCHING[weight]()(level_of(a, b), x, real))).sum()
    return tuple(torch.autograd.grad(loss, theta)[0].tolist())


@pytest.mark.parametrize(("a", "b"), LEVELS)
def test_the_direction_is_the_gradient_of_the_kl(a, b):
    v1, v2 = a**2 * TAU**2 + b**2, a**2 * LAM + b**2
    truth = a**2 * (MU - M) / v2, a**2 * TAU * (1 / v2 - 1 / v1)
    assert gradient(a, b, "KL", sds=False) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(("a", "b"), LEVELS)
def test_sds_is_the_same_without_the_entropy(a, b):
    v2 = a**2 * LAM + b**2
    truth = a**2 * (MU - M) / v2, a**2 * TAU / v2
    assert gradient(a, b, "KL", sds=True) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(("weight", "relative"), [("Eps", lambda a, b: b**3 / a), ("Alpha", lambda a, b: b**2 / a)])
def test_weights_are_those_of_the_papers(weight, relative):
    for a, b in LEVELS:
        ours, kl = gradient(a, b, weight, sds=False), gradient(a, b, "KL", sds=False)
        assert ours == pytest.approx([relative(a, b) * g for g in kl], rel=1e-9)


def test_eps_weighs_the_difference_of_noises_by_the_variance():
    a, b = LEVELS[1]
    draw = torch.Generator().manual_seed(0)
    x_t, real, fake = torch.randn(3, 5, 2, generator=draw, dtype=torch.float64)
    w = MATCHING["Eps"]()(level_of(a, b), x_t, real)
    noises = [(x_t - a * x0) / b for x0 in (real, fake)]
    assert torch.allclose(w * (fake - real), b**2 * (noises[0] - noises[1]), atol=1e-12)


def test_a_normalized_direction_has_mean_size_one_where_the_fake_is_the_sample():
    draw = torch.Generator().manual_seed(0)
    x, real = torch.randn(2, 5, 3, 4, generator=draw, dtype=torch.float64)
    real[2] = x[2]
    w = MATCHING["Normalized"]()(level_of(0.5, 0.5), x, real)
    size = (w * (x - real)).abs().flatten(1).mean(1)
    assert size.tolist() == pytest.approx([1, 1, 0, 1, 1])


def test_only_the_sample_has_a_gradient_and_it_is_the_direction_over_the_features():
    draw = torch.Generator().manual_seed(1)
    x, fake, real = (t.requires_grad_() for t in torch.randn(3, 4, 3, generator=draw, dtype=torch.float64).unbind())
    pull(x, fake, real, torch.tensor(0.7, dtype=torch.float64)).sum().backward()
    assert torch.allclose(x.grad, 0.7 * (fake - real) / 3)
    assert fake.grad is None
    assert real.grad is None
    with pytest.raises(ValueError, match="one shape"):
        pull(x, fake[:, :2], real, torch.ones(()))


GRID = torch.linspace(-12, 12, 24001, dtype=torch.float64)
STEP = (GRID[1] - GRID[0]).item()


def densities() -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(norm(m, s).pdf(GRID.numpy())) for m, s in ((0.3, 0.9), (-0.8, 1.4)))


def value(name: str, logits: Tensor) -> float:
    """The discriminator's expected loss; each of its terms is one of the two densities'."""
    real, fake = densities()
    never = torch.full_like(GRID, 1e9)
    loss = ADVERSARIAL[name].discriminator
    return float((real * loss(logits, -never) + fake * loss(never, logits)).sum() * STEP)


def best_logits(name: str) -> Tensor:
    real, fake = densities()
    return real.log() - fake.log() if name == "nonsaturating" else torch.where(real > fake, 1.0, -1.0).double()


def known(name: str) -> float:
    real, fake = densities()
    mean = (real + fake) / 2
    js = 0.5 * float((real * (real / mean).log() + fake * (fake / mean).log()).sum() * STEP)
    tv = 0.5 * float((real - fake).abs().sum() * STEP)
    return math.log(4) - 2 * js if name == "nonsaturating" else 2 * (1 - tv)


@pytest.mark.parametrize("name", ["nonsaturating", "hinge"])
def test_the_discriminators_least_loss_is_known_and_is_least(name):
    logits = best_logits(name)
    assert value(name, logits) == pytest.approx(known(name), abs=1e-6)
    for wrong in (logits + 0.1, logits - 0.1, 1.2 * logits, 0.8 * logits, -logits):
        assert value(name, wrong) > value(name, logits) + 1e-4


def test_generator_losses_by_hand():
    logits = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    soft, hard = ADVERSARIAL["nonsaturating"].generator(logits), ADVERSARIAL["hinge"].generator(logits)
    assert soft.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-2))])
    assert hard.tolist() == [0.0, -2.0]
    (gradient,) = torch.autograd.grad(soft.sum(), logits)
    assert gradient.tolist() == pytest.approx([-0.5, -1 / (1 + math.exp(2))])


def test_the_gradient_penalty_and_its_own_gradient():
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty((w * x.square()).sum(1), x)
    assert penalty.tolist() == pytest.approx((2 * w * x).square().sum(1).tolist())
    (gradient,) = torch.autograd.grad(penalty.sum(), w)
    assert gradient.tolist() == pytest.approx((8 * w * x.square()).sum(0).tolist())
