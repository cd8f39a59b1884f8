"""Re-noise, coefficient-preserving, reverse-SDE and Langevin kernels: closed forms, laws, and DDPO on each."""

import math
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from chains import affine, all_transitions, collect
from laws import Oracle, steps_of

from rlfusion.agents.ddpo import Config, Learner
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import KERNELS
from rlfusion.diffusion.grid import TimeGrid, repeated
from rlfusion.diffusion.kernel import CPS, DDIM, DDPM, FlowSDE, Langevin, Renoise, ReverseSDE, transition
from rlfusion.diffusion.kinds import InstaFlow
from rlfusion.diffusion.parameterization import Prediction, target
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import sample
from rlfusion.diffusion.schedule import DDPM as Table
from rlfusion.diffusion.schedule import VP, Cosine, Geometric, Karras, Rectified, ScaledLinear, Trig, ZeroSNR, level

CHAINS = [
    (Renoise(), Table()),
    (Renoise(), Trig(0.5)),
    (CPS(0.3), Rectified()),
    (CPS(1.0), ZeroSNR()),
    (ReverseSDE(), VP()),
    (ReverseSDE(), ScaledLinear()),
    (ReverseSDE(0.5), Geometric(0.01, 3.0)),
    (DDIM(1.0), Karras(0.01, 3.0)),
    (DDPM(), VP()),
    (FlowSDE(0.5), Rectified(1e-5)),
    (Langevin(0.4), Geometric(0.01, 3.0)),
]


def coefficients(kernel, schedule, t: float, s: float) -> tuple[float, float, float]:
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (t, s))
    return tuple(float(c) for c in kernel.coefficients(schedule(t), schedule(s), s - t))


def gaussians(count: int, n: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=g, dtype=torch.float64) for _ in range(count)]


def variance_of(kernel, schedule, times, start, m=0.7, lam=0.25) -> tuple[float, float]:
    """The law of the chain on N(m, lam) with the exact denoiser."""
    at, to = schedule(times[:-1]), schedule(times[1:])
    rows = torch.broadcast_tensors(at.alpha, at.sigma, *kernel.coefficients(at, to, times.diff()))
    return oracles.gaussian_law(m, lam, torch.stack(rows, 1).tolist(), start)


@pytest.mark.parametrize(("steps", "variance"), [(5, 0.0563), (16, 0.091), (50, 0.108), (1000, 0.1225)])
def test_renoise_with_a_diffusion_denoiser_halves_the_variance(steps, variance):
    """handbook-notes 2.2.3: N(0.7, 0.25), the 1000-step table, an even index grid."""
    times = torch.linspace(1000, 0, steps + 1, dtype=torch.float64).round() / 1000
    got = variance_of(Renoise(), Table(), times, (0.0, 1.0))[1]
    assert got == pytest.approx(variance, abs=5.1e-5 if steps in (5, 1000) else 5.1e-4)


class Consistency(torch.nn.Module):
    """The exact consistency function of N(0.7, 0.25) on x0 + t eps."""

    schedule = Karras()

    def forward(self, x, t, cond=None):
        tau = level(self.schedule, t, x).sigma
        f = 0.7 + ((0.25 + 0.002**2) / (0.25 + tau**2)).sqrt() * (x - 0.7)
        return Prediction(f, (x - f) / tau)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_multistep_consistency_sampling_has_the_law_of_the_data(steps):
    """Alg. 4: N(m, lam + t_min^2) after any number of steps, from N(0, 80^2) (erratum 35)."""
    n, times = 40_000, TimeGrid(steps).times(Karras())
    policy = Policy(Consistency(), Renoise(0.002))
    noise = torch.randn(n, steps + 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = sample(policy, noise, times)
    assert policy.stds(times)[-1] == 0  # the last line of Alg. 4 returns f
    assert abs(x.mean().item() - 0.7) < 4 * 0.5 / math.sqrt(n) + 0.0045 * (steps == 1)  # the start lacks m
    assert abs(x.var().item() - 0.250004) < 4 * 0.25 * math.sqrt(2 / n)


def test_renoise_is_eq_26_and_the_ddim_of_eta_max():
    assert coefficients(Renoise(0.002), Karras(), 1.0, 0.4) == pytest.approx(
        (1.0, 0.0, math.sqrt(float(Karras()(torch.tensor(0.4).double()).sigma) ** 2 - 0.002**2))
    )
    at, to = (float(Table()(torch.tensor(t).double()).alpha ** 2) for t in (0.75, 0.3))
    most = math.sqrt((1 - at) / (1 - at / to))  # handbook-notes 2.2.1; erratum 38
    assert coefficients(DDIM(most), Table(), 0.75, 0.3) == pytest.approx(
        coefficients(Renoise(), Table(), 0.75, 0.3), abs=1e-7
    )
    with pytest.raises(ConfigError, match=r"at most sigma = 0\.002"):
        coefficients(Renoise(0.003), Karras(), 1.0, 0.0)


@pytest.mark.parametrize("schedule", [Rectified(), Cosine(), Trig(0.5), Karras()], ids=repr)
def test_cps_keeps_the_coefficients_between_ddim_and_renoise(schedule):
    for t, s in ((1.0, 0.8), (0.8, 0.3), (0.3, 0.0)):
        to = schedule(torch.tensor(s, dtype=torch.float64))
        for eta in (0.0, 0.3, 1.0):
            kept, b, std = coefficients(CPS(eta), schedule, t, s)
            assert kept == float(to.alpha)
            assert b**2 + std**2 == pytest.approx(float(to.sigma) ** 2, rel=1e-12)
            assert std == pytest.approx(float(to.sigma) * math.sin(eta * math.pi / 2))
        near = {"rel": 1e-12, "abs": 1e-14}
        assert coefficients(CPS(0.0), schedule, t, s) == pytest.approx(coefficients(DDIM(0.0), schedule, t, s), **near)
        assert coefficients(CPS(1.0), schedule, t, s) == pytest.approx(coefficients(Renoise(), schedule, t, s), **near)


@pytest.mark.parametrize("noise", [0.0, 0.6, 1.0])
def test_reverse_sde_is_euler_maruyama_of_the_printed_sde(noise):
    """handbook Eq. 2-4: dx = [f x - (1 + noise^2) / 2 g^2 score] dt + noise g dw, from beta(t) or sigma(t) alone."""
    x0, eps = gaussians(2)
    for t, s in ((1.0, 0.9), (0.6, 0.55), (0.1, 0.09)):
        t, s = torch.tensor(t).double(), torch.tensor(s).double()
        beta, rate = 0.1 + t * 19.9, math.log(50 / 0.01)
        for schedule, drift, g2 in (
            (VP(), -beta / 2, beta),
            (Geometric(), 0.0, 2 * rate * Geometric()(t).sigma ** 2),
        ):
            at = schedule(t)
            x, score = at.alpha * x0 + at.sigma * eps, -eps / at.sigma
            mean = x + (drift * x - (1 + noise**2) / 2 * g2 * score) * (s - t)
            got = transition(ReverseSDE(noise), Prediction(x0, eps), at, schedule(s), s - t)
            torch.testing.assert_close(got.mean, mean)
            torch.testing.assert_close(got.std, noise * (g2 * (t - s)).sqrt())


@pytest.mark.parametrize("noise", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("schedule", [VP(), Geometric(0.01, 10.0), Karras(0.01, 10.0)], ids=repr)
def test_reverse_sde_converges_to_the_data_law(schedule, noise):
    ends = [float(v) for v in (*schedule(torch.ones(1).double())[:2], schedule(torch.zeros(1).double()).sigma)]
    start, errors = (0.7 * ends[0], 0.25 * ends[0] ** 2 + ends[1] ** 2), []
    for n in (500, 1000, 2000):
        mean, var = variance_of(ReverseSDE(noise), schedule, TimeGrid(n).times(schedule), start)
        errors.append(max(abs(mean - 0.7), abs(var - 0.25 - ends[2] ** 2)))
    assert errors[2] < 6e-3
    tiny = 1e-5  # the time reversal of the geometric path: its errors of drift and noise cancel
    assert errors[2] < max(0.6 * errors[1], tiny)
    assert errors[1] < max(0.6 * errors[0], tiny)


def test_langevin_has_the_stationary_variance_of_the_discrete_dynamics():
    """handbook-notes erratum 27: V / (1 - d / (4 V)), here V = lam + sigma^2 = 0.25 and d = 0.2: 0.3125."""
    schedule = Geometric(0.3, 1.0)
    times = repeated(torch.zeros(1, dtype=torch.float64), 400)
    mean, var = variance_of(Langevin(0.2 / 0.09), schedule, times, (0.0, 1.0), lam=0.16)
    assert (mean, var) == (pytest.approx(0.7), pytest.approx(0.3125))


def test_langevin_is_the_printed_move_and_anneals_to_the_data():
    x0, eps = gaussians(2)
    at, to = Geometric()(torch.tensor(0.7).double()), Geometric()(torch.tensor(0.6).double())
    d = 0.3 * at.sigma**2
    got = transition(Langevin(0.3), Prediction(x0, eps), at, to, torch.tensor(-0.1))
    torch.testing.assert_close(got.mean, x0 + at.sigma * eps + d / 2 * (-eps / at.sigma))
    torch.testing.assert_close(got.std, d.sqrt())
    schedule = Geometric(0.01, 10.0)
    times = repeated(TimeGrid(60).times(schedule), 100)
    assert len(times) == 61 * 100 + 1
    assert torch.equal(times, TimeGrid(60, repeats=100).times(schedule))
    mean, var = variance_of(Langevin(0.1), schedule, times, (0.0, 100.0))
    assert (mean, var) == (pytest.approx(0.7, abs=0.02), pytest.approx(0.25, abs=0.02))
    with pytest.raises(ConfigError, match="count"):
        repeated(times, 0)


@pytest.mark.parametrize(("kernel", "schedule"), CHAINS, ids=str)
def test_law_of_the_sampler(kernel, schedule):
    """N(0.7, 0.25) with its exact denoiser: mean and variance of 20,000 samples within 4 standard errors."""
    n, times = 20_000, TimeGrid(6).times(schedule)
    policy = Policy(Oracle(oracles.Mixture.scalar([1.0], [0.7], [0.25]), schedule), kernel)
    noise = torch.randn(n, 7, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = sample(policy, noise, times).numpy()
    mean, var = oracles.gaussian_law(0.7, 0.25, steps_of(policy, times), (0.0, policy.prior_std(times) ** 2))
    assert abs(x.mean() - mean) < 4 * math.sqrt(var / n)
    assert abs(x.var() - var) < 4 * var * math.sqrt(2 / n)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_instaflow_steps_of_alg_6_to_8_in_the_rescaled_space(eta):
    """y_s = [a_s x0h + sqrt(1 - ab_s - sigma^2)(y_t - gamma u) + sigma z] / B_s; Alg. 6 is the posterior in y, Alg. 7
    y_s = [a_s x0h + sqrt(1 - ab_s) z] / B_s."""
    x0, eps, z = gaussians(3)
    for t, s in pairwise((1.0, 0.7, 0.2, 0.001)):
        at, to = (VP()(torch.tensor(v).double()) for v in (t, s))
        y, u = (at.alpha * x0 + at.sigma * eps) / (at.alpha + at.sigma), target(InstaFlow(), x0, eps, at)
        gamma, B = at.alpha / (at.alpha + at.sigma), to.alpha + to.sigma
        x0h, sigma = y + (1 - gamma) * u, oracles.ddim(float(at.alpha**2), float(to.alpha**2), eta)[2]
        rest = (1 - to.alpha**2 - sigma**2).clamp(min=0).sqrt()
        expected = (to.alpha * x0h + rest * (y - gamma * u) + sigma * z) / B
        got = transition(DDIM(eta), Prediction(x0, eps), at, to, torch.tensor(s - t)).sample(z) / B
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        again = transition(Renoise(), Prediction(x0, eps), at, to, torch.tensor(s - t)).sample(z) / B
        torch.testing.assert_close(again, (to.alpha * x0h + to.sigma * z) / B)
        if eta == 1.0:
            c0, cx, sigma = oracles.posterior(float(at.alpha**2), float(to.alpha**2), large=False)
            expected = (c0 * x0h + cx * (at.alpha + at.sigma) * y + sigma * z) / B
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_the_trigflow_step_is_ddim_0():
    """handbook 2.5: cos(t - s) x - sin(t - s) V, with z = sigma_data eps."""
    x0, eps = gaussians(2)
    for t, s in ((1.0, 0.6), (0.6, 0.1), (0.1, 0.0)):
        angle, to = t * math.pi / 2, s * math.pi / 2
        x = math.cos(angle) * x0 + math.sin(angle) * 0.5 * eps
        V = math.cos(angle) * 0.5 * eps - math.sin(angle) * x0
        at, end = (Trig(0.5)(torch.tensor(v).double()) for v in (t, s))
        got = transition(DDIM(0.0), Prediction(x0, eps), at, end, torch.tensor(s - t)).mean
        torch.testing.assert_close(got, math.cos(angle - to) * x - math.sin(angle - to) * V)


@pytest.mark.parametrize(("kernel", "schedule"), CHAINS, ids=str)
def test_ddpo_takes_every_kernel_and_schedule(kernel, schedule):
    """At the acting weights every log ratio is 0, and an update changes the weights."""
    policy, times = affine((0.3, 0.1), schedule, kernel, "x0"), TimeGrid(4).times(schedule)
    noise = torch.randn(12, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = collect(policy, times, noise, lambda x: x.mean((1, 2, 3)))
    learner = Learner(policy, times, Config(epochs=1, updates_per_epoch=1))
    walk, step = all_transitions(batch)
    assert len(walk) == 12 * len(learner.transitions.steps) >= 12 * 3
    assert learner.transitions.log_ratio(batch, walk, step).abs().max() < 1e-9
    before = policy.denoiser.net.theta.detach().clone()
    metrics = learner.update(batch)
    assert np.isfinite(list(metrics.values())).all()
    assert not torch.equal(before, policy.denoiser.net.theta)


@pytest.mark.parametrize("kernel", sorted({k for k, _ in CHAINS}, key=repr), ids=repr)
def test_a_kernel_is_read_back_from_its_text(kernel):
    assert spec.parse(repr(kernel), KERNELS, "kernel") == kernel


@pytest.mark.parametrize(
    "make",
    [
        lambda: Renoise(-1.0),
        lambda: CPS(1.1),
        lambda: CPS(math.nan),
        lambda: ReverseSDE(-0.1),
        lambda: ReverseSDE(math.inf),
        lambda: Langevin(0.0),
        lambda: Langevin(4.0),
        lambda: coefficients(ReverseSDE(), Rectified(), 1.0, 0.5),
        lambda: coefficients(Langevin(), VP(), 1.0, 0.5),
    ],
)
def test_what_cannot_work_is_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()
