"""Loss weights against the tables of their papers, and laws of times against their quantiles."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.parameterization import convert, predict, solve, target
from rlfusion.diffusion.schedule import (
    DDPM,
    VP,
    Cosine,
    Geometric,
    Karras,
    Rectified,
    ScaledLinear,
    Trig,
    ZeroSNR,
    time_of,
)
from rlfusion.objectives.times import LogitNormal, LogNormal, Uniform
from rlfusion.objectives.weighting import (
    SNR,
    VLB,
    BoundedSNR,
    MinSNR,
    Own,
    RectifiedFlow,
    Score,
    SNRPlusOne,
    TruncatedSNR,
)
from rlfusion.pretrain.denoising import Denoising

SCHEDULES = [
    *(DDPM(), ScaledLinear(), VP(), Cosine(), ZeroSNR(), Rectified(), Trig(), Trig(0.5), Karras(), Geometric()),
]
T = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)

TABLE = {
    SNR(): (lambda s: s, lambda s: 1 + 0 * s, lambda s: s / (s + 1)),
    TruncatedSNR(): (
        lambda s: s.clamp(min=1),
        lambda s: (1 / s).clamp(min=1),
        lambda s: s.clamp(min=1) / (s + 1),
    ),
    SNRPlusOne(): (lambda s: s + 1, lambda s: (s + 1) / s, lambda s: 1 + 0 * s),
    MinSNR(): (lambda s: s.clamp(max=5), lambda s: s.clamp(max=5) / s, lambda s: s.clamp(max=5) / (s + 1)),
    BoundedSNR(1.0, 5.0): (
        lambda s: s.clamp(1, 5),
        lambda s: s.clamp(1, 5) / s,
        lambda s: s.clamp(1, 5) / (s + 1),
    ),
    MinSNR(2.0): (lambda s: s.clamp(max=2), lambda s: s.clamp(max=2) / s, lambda s: s.clamp(max=2) / (s + 1)),
}
"""On the x0, eps and v error of a VP schedule: Hang et al. 2023, section 3.4; Salimans & Ho 2022, section 4."""


@pytest.mark.parametrize("schedule", [DDPM(), VP(), Cosine(), Trig()], ids=repr)
@pytest.mark.parametrize("weight", TABLE, ids=repr)
def test_weights_are_those_of_the_papers(weight, schedule):
    l = schedule(T)
    snr = (l.alpha / l.sigma) ** 2
    assert snr.min() < 1 < 5 < snr.max()
    for kind, expected in zip(("x0", "eps", "v"), TABLE[weight]):
        torch.testing.assert_close(weight(kind, l), expected(snr), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "v_handbook", "flow", "score", "InstaFlow", "EDM()", "TrigFlow()"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_weight_is_one_loss_whatever_the_network_predicts(kind, schedule):
    """w |x0 - x0_hat|^2 = W |y - y_hat|^2."""
    g = torch.Generator().manual_seed(0)
    x0, eps, error = torch.randn(3, len(T), generator=g, dtype=torch.float64)
    l = schedule(T)
    x, y = l.alpha * x0 + l.sigma * eps, target(kind, x0, eps, l)
    wrong = predict(solve(kind, l), y + error, x).x0 - x0
    snr = (l.alpha / l.sigma) ** 2
    torch.testing.assert_close(MinSNR()(kind, l) * error**2, snr.clamp(max=5) * wrong**2, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(Own()(kind, l), torch.ones_like(T))


@pytest.mark.parametrize("schedule", [DDPM(), VP(), Cosine(), Trig(), Rectified(), Karras(), Geometric()], ids=repr)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow", "score"])
def test_score_weighs_the_error_of_the_score_by_one(kind, schedule):
    """W |y - y_hat|^2 = |s - s_hat|^2, s = -eps / sigma, by way of the prediction; 1 / sigma^2 on the eps error."""
    g = torch.Generator().manual_seed(0)
    x0, eps, error = torch.randn(3, len(T), generator=g, dtype=torch.float64)
    l = schedule(T)
    x, y = l.alpha * x0 + l.sigma * eps, target(kind, x0, eps, l)
    wrong = (predict(solve(kind, l), y + error, x).eps - eps) / -l.sigma
    torch.testing.assert_close(Score()(kind, l) * error**2, wrong**2, rtol=1e-6, atol=1e-12)


def test_score_is_one_over_sigma_squared_on_eps_and_the_square_of_alpha_over_sigma_squared_on_x0():
    l = VP()(T)
    torch.testing.assert_close(Score()("eps", l), 1 / l.sigma**2, rtol=1e-10, atol=0)
    torch.testing.assert_close(Score()("score", l), torch.ones_like(T), rtol=1e-10, atol=0)
    torch.testing.assert_close(Score()("x0", l), l.alpha**2 / l.sigma**4, rtol=1e-10, atol=0)
    torch.testing.assert_close(Score()("v", l), l.alpha**2 / l.sigma**2, rtol=1e-10, atol=0)


def test_ncsn_weighs_the_score_by_sigma_squared_and_edm_the_denoiser_by_lambda():
    """Song & Ermon 2019, Eq. 6; Karras et al. 2022, Table 1: lambda = (sigma^2 + sd^2) / (sigma sd)^2."""
    l = Geometric()(T)
    torch.testing.assert_close(SNR()("score", l), l.sigma**2)
    l, sd = Karras()(T), 0.5
    own = Own()("EDM()", l) / solve("EDM()", l).x0_y ** 2  # on the x0 error
    torch.testing.assert_close(own, (l.sigma**2 + sd**2) / (l.sigma * sd) ** 2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_bound_weighs_by_half_the_slope_of_the_snr(schedule):
    """Kingma et al. 2021: -SNR'(t) / 2 on the x0 error, by central differences (inside one step of a table)."""
    t, h = T + 0.0005, 1e-6

    def snr(t):
        l = schedule(t)
        return (l.alpha / l.sigma) ** 2

    expected = -(snr(t + h) - snr(t - h)) / (2 * h) / 2
    torch.testing.assert_close(VLB()("x0", schedule(t)), expected, rtol=1e-5, atol=1e-8)


def test_the_bound_weighs_as_the_printed_kl_of_the_ddpm_chain():
    """handbook-notes 2.2.2, erratum 17: (1 - al)^2 / (2 s^2 al (1 - ab_t)) on the eps error, s^2 small, a T-th of w."""
    schedule, big = DDPM(), 1000
    k = torch.arange(50, 1000, 50, dtype=torch.float64)
    ab_t, ab_s = (schedule(j / big).alpha ** 2 for j in (k, k - 1))
    al = ab_t / ab_s
    small = (1 - al) * (1 - ab_s) / (1 - ab_t)
    printed = (1 - al) ** 2 / (2 * small * al * (1 - ab_t))
    exact = ab_s / (1 - ab_s) - ab_t / (1 - ab_t)
    torch.testing.assert_close(printed, exact / 2 * (1 - ab_t) / ab_t, rtol=1e-8, atol=0)
    middle = VLB()("x0", schedule((k - 0.5) / big)) / big
    torch.testing.assert_close(middle, exact / 2, rtol=2e-3, atol=0)


def test_with_geometric_levels_the_bound_is_the_plain_eps_loss():
    l = Geometric(0.02, 10.0)(T)
    torch.testing.assert_close(VLB()("eps", l), torch.full_like(T, math.log(500)))


@pytest.mark.parametrize("schedule", [DDPM(), Cosine(), Trig()], ids=repr)
@pytest.mark.parametrize("kind", ["eps", "v", "v_handbook", "flow"])
def test_a_network_read_as_a_rectified_flow_has_the_error_in_u(kind, schedule):
    """Handbook 2.4.5 corrected: B v - x (sigma - alpha) - (x0 - eps) = (B / alpha) (eps - eps_hat)."""
    t = T[T < 0.9]
    l = schedule(t)
    g = torch.Generator().manual_seed(0)
    x0, eps, error = torch.randn(3, len(t), generator=g, dtype=torch.float64)
    x, y = l.alpha * x0 + l.sigma * eps, target(kind, x0, eps, l)
    wrong = convert(kind, "InstaFlow()", y + error, x, l) - (x0 - eps)
    torch.testing.assert_close(RectifiedFlow(1e9)(kind, l) * error**2, wrong**2, rtol=1e-6, atol=1e-12)
    capped = RectifiedFlow(4.0)("eps", l)
    assert capped.max().item() == pytest.approx(4)
    assert (capped < 4).any()


U = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_time_of_a_ratio_is_the_inverse(schedule):
    l = schedule(T)
    torch.testing.assert_close(time_of(schedule, l.alpha, l.sigma), T, rtol=0, atol=2e-9)


def test_quantiles_of_times():
    z = torch.from_numpy(norm.ppf(U.numpy()))
    t = LogitNormal(0.3, 0.7)(U, Cosine())
    torch.testing.assert_close(torch.logit(t), 0.3 + 0.7 * z)
    for schedule in (Karras(), Cosine(), Geometric(1e-3, 100.0)):
        l = schedule(LogNormal(-1.2, 1.2)(U, schedule))
        torch.testing.assert_close((l.sigma / l.alpha).log(), -1.2 + 1.2 * z, rtol=0, atol=1e-6)
    torch.testing.assert_close(Uniform(0.01)(U, Cosine()), U.clamp(0.01, 0.99))
    assert np.allclose(Uniform(0.0)(U, Cosine()), U)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Denoising(weight="MinSRN()"), ["'MinSRN'", "did you mean 'MinSNR'"]),
        (lambda: Denoising(weight="MinSNR(gamma=-1)"), ["gamma = -1", "> 0"]),
        (lambda: Denoising(times="Uniform(margin=0.5)"), ["margin = 0.5", "< 0.5"]),
        (lambda: Denoising(weight="RectifiedFlow(cap=0.5)"), ["cap = 0.5", ">= 1"]),
        (lambda: Denoising(times="LogitNormal(std=0)"), ["std = 0", "> 0"]),
        (lambda: Denoising(times="LogNormal(sdt=1)"), ["'sdt'", "did you mean 'std'"]),
    ],
)
def test_what_cannot_work_is_refused(make, words):
    with pytest.raises(ConfigError) as refused:
        make()
    assert all(word in str(refused.value) for word in words)
