"""The oracles agree with each other, with quadrature and with finite differences."""

import math

import numpy as np
import oracles
import pytest
import torch

from rlfusion.diffusion.parameterization import KINDS, Prediction, named, target
from rlfusion.diffusion.schedule import Trig, level
from rlfusion.objectives import weighted_mse

PLANE = oracles.Mixture(
    np.array([0.4, 0.6]),
    np.array([[-1.0, 0.3], [0.6, 0.2]]),
    np.array([np.diag([0.2, 0.5]), [[0.4, 0.1], [0.1, 0.3]]]),
)
LINE = oracles.Mixture.scalar([0.35, 0.65], [-0.9, 0.6], [0.05, 0.1])


@pytest.mark.parametrize("t", [1.0, 0.6, 0.2])
def test_tweedie(t):
    """x0 and eps give back x; the score is -eps / b and the gradient of the log-density."""
    a, b = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    x, h = np.random.default_rng(0).standard_normal((9, 2)), 1e-5
    np.testing.assert_allclose(a * PLANE.x0(x, a, b) + b * PLANE.eps(x, a, b), x, atol=1e-12)
    np.testing.assert_allclose(PLANE.score(x, a, b), -PLANE.eps(x, a, b) / b, atol=1e-12)
    at = PLANE.diffuse(a, b)
    slope = [(at.log_density(x + h * e) - at.log_density(x - h * e)) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(PLANE.score(x, a, b), np.stack(slope, 1), atol=1e-8)


def test_the_posterior_mean_is_the_integral():
    """E[x_0 | x_t] by quadrature over x_0."""
    a, b, grid = 0.8, 0.6, np.linspace(-4, 4, 4001)
    for x in (-1.2, 0.1, 0.9):
        w = np.exp(LINE.log_density(grid[:, None]) - (x - a * grid) ** 2 / (2 * b**2))
        assert LINE.x0(np.array([[x]]), a, b).item() == pytest.approx((w * grid).sum() / w.sum(), rel=1e-9)


def test_draws_of_the_posterior_are_those_of_the_pair():
    """Their mean and variance are ``x0`` and ``x0_var``; with x they are distributed as the pair (x_0, x) itself."""
    rng, n = np.random.default_rng(0), 40_000
    for x, ratio in ((-0.6, 0.3), (0.1, 0.8), (0.4, 3.0)):
        drawn = oracles.posterior_draw(LINE, np.full(n, x), ratio, rng)
        mean, var = (f(np.array([[x]]), 1.0, ratio).item() for f in (LINE.x0, LINE.x0_var))
        assert abs(drawn.mean() - mean) < 4 * (var / n) ** 0.5
        assert drawn.var() == pytest.approx(var, rel=0.05)
    ratio, x0 = rng.choice([0.2, 1.0], n), LINE.sample(n, rng)[:, 0]
    x = x0 + ratio * rng.standard_normal(n)
    for f in (lambda x0, x: x0 * x, lambda x0, x: np.sin(3 * x0) * x, lambda x0, x: x0**2 * (ratio > 0.5)):
        gap = f(oracles.posterior_draw(LINE, x, ratio, rng), x) - f(x0, x)
        assert abs(gap.mean()) < 4 * gap.std() / n**0.5


def test_the_cdf_is_the_integral_of_the_density_and_samples_follow_it():
    grid = np.linspace(-4, 1, 5001)
    density = np.exp(LINE.log_density(grid[:, None]))
    assert np.trapezoid(density, grid) == pytest.approx(LINE.cdf(np.array(1.0)), rel=1e-6)
    x = np.sort(LINE.sample(20_000, np.random.default_rng(0))[:, 0])
    assert np.abs(LINE.cdf(x) - (np.arange(20_000) + 0.5) / 20_000).max() < 2.2 / math.sqrt(20_000)


def test_the_tilt_is_proportional_to_the_weighted_density():
    x, r = np.random.default_rng(0).standard_normal((7, 2)), np.array([0.5, -0.4])
    tilted = PLANE.tilt(k=0.8, r=r, beta=1.5)
    reward = -0.8 / 2 * ((x - r) ** 2).sum(1)
    gap = PLANE.log_density(x) + 1.5 * reward - tilted.log_density(x)
    np.testing.assert_allclose(gap, gap[0], atol=1e-10)
    assert tilted.weight.sum() == pytest.approx(1)


def test_the_flow_map_of_a_gaussian_is_linear():
    """handbook-notes section 3: a' m + sqrt(S' / S) (x - a m)."""
    law, x, (a, b) = oracles.Mixture.scalar([1.0], [0.7], [0.25]), np.linspace(-2, 2, 9), (0.6, 0.8)
    S = a**2 * 0.25 + b**2
    truth = 0.7 + math.sqrt(0.25 / S) * (x - a * 0.7)
    np.testing.assert_allclose(oracles.flow_map(law, x, (a, b), (1.0, 0.0)), truth, atol=1e-9)


def test_the_quadrature_of_a_sampler_is_the_recursion_on_a_gaussian():
    law, ab = oracles.Mixture.scalar([1.0], [0.7], [0.25]), [0.0, 0.1, 0.4, 0.8, 1.0]
    steps = [
        (math.sqrt(t), math.sqrt(1 - t), *oracles.ddim(t, s, eta))
        for t, s, eta in zip(ab, ab[1:], (1.0, 0.5, 0.0, 1.0))
    ]
    mean, var = oracles.gaussian_law(0.7, 0.25, steps, (0.0, 1.0))
    q = np.linspace(-1, 2.5, 50)
    exact = oracles.Mixture.scalar([1.0], [mean], [var]).cdf(q)
    np.testing.assert_allclose(oracles.mixture_law(law, steps, 1.0)(q), exact, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_predictor_reaches_the_loss_floor_and_no_other_is_below(kind):
    """Every kind's own mean squared error, of the exact denoiser, on 100,000 samples of N(m, diag lam)."""
    lam, m, n = np.array([0.1, 0.9]), np.array([[0.5, -0.2]]), 100_000
    law, rng = oracles.Mixture(np.ones(1), m, np.diag(lam)[None]), np.random.default_rng(0)
    x0, eps = law.sample(n, rng), rng.standard_normal((n, 2))
    at = level(Trig(), torch.tensor(0.4, dtype=torch.float64), torch.from_numpy(x0))
    a, b = float(at.alpha), float(at.sigma)
    x = a * x0 + b * eps
    best = Prediction(*(torch.from_numpy(f(x, a, b)) for f in (law.x0, law.eps)))
    truth = target(kind, torch.from_numpy(x0), torch.from_numpy(eps), at)
    losses = [float(weighted_mse(target(kind, best.x0 * c, best.eps, at), truth).mean()) for c in (1.0, 0.7, 1.3)]
    c0, c1 = (float(c) for c in named(kind).row(at))
    floor = oracles.loss_floor(lam, c0, c1, a, b) / 2
    assert losses[0] == pytest.approx(floor, rel=0.02)
    assert kind in ("eps", "score") or min(losses[1:]) > floor * 1.02
