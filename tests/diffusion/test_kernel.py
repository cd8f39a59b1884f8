"""Kernels against the handbook's formulas, their induced marginals, and the released Flow-GRPO step."""

import math
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, DDPM, FlowSDE, transition
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.policy import Policy, require_stochastic
from rlfusion.diffusion.schedule import DDPM as Table
from rlfusion.diffusion.schedule import Cosine, Rectified, Trig, level

KERNELS = [DDPM("small"), DDPM("large"), DDIM(0.0), DDIM(0.4), DDIM(1.0), FlowSDE(0.0), FlowSDE(0.7)]
NOISY = [k for k in KERNELS if k.stochastic]
VP = [Table(), Cosine(), Trig()]
PAIRS = [(1.0, 0.999), (1.0, 0.5), (0.75, 0.3), (0.4, 0.2), (0.05, 0.001), (0.002, 0.001), (0.3, 0.0), (0.001, 0.0)]


def coefficients(kernel, schedule, t: float, s: float) -> tuple[float, float, float]:
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (t, s))
    return tuple(float(c) for c in kernel.coefficients(schedule(t), schedule(s), s - t))


def ab(schedule, t: float) -> float:
    return float(schedule(torch.tensor(t, dtype=torch.float64)).alpha ** 2) if t else 1.0  # without a last-bit error


@pytest.mark.parametrize("schedule", VP, ids=repr)
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_handbook_coefficients_for_any_gap(schedule, t, s):
    at, to = ab(schedule, t), ab(schedule, s)
    near = {"rel": 1e-7, "abs": 1e-8}
    assert coefficients(DDPM("small"), schedule, t, s) == pytest.approx(oracles.ddpm(at, to), **near)
    assert coefficients(DDPM("large"), schedule, t, s) == pytest.approx(oracles.ddpm(at, to, large=True), **near)
    for eta in (0.0, 0.3, 1.0):
        assert coefficients(DDIM(eta), schedule, t, s) == pytest.approx(oracles.ddim(at, to, eta), **near)


@pytest.mark.parametrize("schedule", [*VP, Rectified()], ids=repr)
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_ddim_with_eta_1_is_the_small_ddpm_step(schedule, t, s):
    assert coefficients(DDIM(1.0), schedule, t, s) == pytest.approx(
        coefficients(DDPM("small"), schedule, t, s), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("schedule", [*VP, Rectified()], ids=repr)
@pytest.mark.parametrize("kernel", [DDPM("small"), DDIM(0.0), DDIM(0.4), DDIM(1.0)], ids=repr)
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_marginals_are_kept(kernel, schedule, t, s):
    A, B, S = coefficients(kernel, schedule, t, s)
    to = schedule(torch.tensor(s, dtype=torch.float64))
    assert math.isclose(A, to.alpha.item(), abs_tol=1e-15)
    assert math.isclose(B**2 + S**2, to.sigma.item() ** 2, abs_tol=1e-14)


@pytest.mark.parametrize("kernel", [DDPM("small"), DDIM(0.0), DDIM(0.7), DDIM(1.0)], ids=repr)
def test_induced_marginal_of_a_mixture_is_the_diffused_mixture(kernel):
    """With the true (x0, eps) of each x_t, the step's samples follow p_s: 60,000 samples, CDF within 4 deviations."""
    law, rng, n = oracles.Mixture.scalar([0.3, 0.7], [-1.0, 0.8], [0.05, 0.2]), np.random.default_rng(0), 60_000
    x0, eps, z = (torch.from_numpy(v) for v in (law.sample(n, rng), *rng.standard_normal((2, n, 1))))
    for t, s in ((1.0, 0.5), (0.5, 0.2), (0.2, 0.03)):
        t, s = torch.tensor(t).double(), torch.tensor(s).double()
        step = transition(kernel, Prediction(x0, eps), Cosine()(t), Cosine()(s), s - t)
        to = law.diffuse(float(Cosine()(s).alpha), float(Cosine()(s).sigma))
        x = np.sort(step.sample(z)[:, 0].numpy())
        assert np.abs(to.cdf(x) - (np.arange(n) + 0.5) / n).max() < 2.2 / math.sqrt(n)  # KS, P(exceed) = 1e-4


@pytest.mark.parametrize(
    ("steps", "ddim", "ddpm"), [(5, 0.0689, 0.0617), (16, 0.173, 0.140), (50, 0.222, 0.197), (1000, 0.2485, 0.2461)]
)
def test_known_final_variances(steps, ddim, ddpm):
    """handbook-notes 2.2.3: N(0.7, 0.25) on the 1000-step table, an even index grid."""
    times = torch.linspace(1000, 0, steps + 1, dtype=torch.float64).round() / 1000
    at, to = Table()(times[:-1]), Table()(times[1:])
    for kernel, expected in ((DDIM(0.0), ddim), (DDPM("small"), ddpm)):
        chain = torch.stack([at.alpha, at.sigma, *kernel.coefficients(at, to, times.diff())], 1).tolist()
        _, variance = oracles.gaussian_law(0.7, 0.25, chain, (0.0, 1.0))
        assert variance == pytest.approx(expected, abs=5.1e-4 if steps in (16, 50) else 5.1e-5)  # the digits printed


@pytest.mark.parametrize("schedule", [*VP, Rectified()], ids=repr)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_the_step_to_clean_data_is_x0_hat_without_noise(kernel, schedule):
    for t in (0.5, 0.001):
        assert coefficients(kernel, schedule, t, 0.0) == pytest.approx((1.0, 0.0, 0.0), abs=1e-15)


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
def test_every_other_step_is_noisy_and_finite(kernel):
    for schedule in (*VP, Rectified()):
        for t, s in PAIRS[:-2]:
            values = coefficients(kernel, schedule, t, s)
            assert all(map(math.isfinite, values))
            assert values[2] > 0


def test_eta_max_is_the_limit():
    at, to = ab(Table(), 0.75), ab(Table(), 0.3)
    most = math.sqrt((1 - at) / (1 - at / to))  # handbook-notes 2.2.1
    renoise = (math.sqrt(to), 0.0, math.sqrt(1 - to))
    assert coefficients(DDIM(most), Table(), 0.75, 0.3) == pytest.approx(renoise, abs=1e-7)
    with pytest.raises(ConfigError, match=f"eta_max = {most:.4f}"):
        coefficients(DDIM(most + 1e-3), Table(), 0.75, 0.3)


@pytest.mark.parametrize("make", [lambda: DDIM(-0.1), lambda: DDIM(math.nan), lambda: FlowSDE(-1.0)])
def test_negative_noise_is_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()


def flow_grpo_step(x, v, sigma: float, sigma_prev: float, sigma_max: float, noise: float, z):
    """sde_step_with_logprob of the released Flow-GRPO, its formulas word for word: (mean, std, sample, log_prob)."""
    dt = sigma_prev - sigma
    std_dev_t = math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma))) * noise
    mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    std = std_dev_t * math.sqrt(-dt)
    sample = mean + std * z
    log_prob = -((sample - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return mean, std, sample, log_prob.sum(1)  # theirs is the mean over features, ours the sum


@pytest.mark.parametrize("noise", [0.3, 0.7])
def test_flow_sde_is_the_step_of_flow_grpo(noise):
    g = torch.Generator().manual_seed(0)
    x0, eps, z = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    times = TimeGrid(8).times(Rectified())
    for t, s in pairwise(times[:-1]):
        x, v = (1 - t) * x0 + t * eps, eps - x0
        mean, std, sample, log_prob = flow_grpo_step(x, v, t.item(), s.item(), times[1].item(), noise, z)
        ours = transition(FlowSDE(noise), Prediction(x0, eps), Rectified()(t), Rectified()(s), s - t)
        torch.testing.assert_close(ours.mean, mean)
        assert float(ours.std) == pytest.approx(std)
        torch.testing.assert_close(ours.sample(z), sample)
        torch.testing.assert_close(ours.log_prob(sample), log_prob)


def final_error(kernel, schedule, times, start: tuple[float, float]) -> float:
    """The larger error of mean and variance after the chain, on N(0.7, 0.25) with its exact denoiser."""
    t, s = times[:-1], times[1:]
    at = schedule(t)
    chain = torch.stack([at.alpha, at.sigma, *kernel.coefficients(at, schedule(s), s - t)], 1).tolist()
    mean, variance = oracles.gaussian_law(0.7, 0.25, chain, start)
    return max(abs(mean - 0.7), abs(variance - 0.25))


@pytest.mark.parametrize("schedule", [Rectified(), Trig(), Cosine()], ids=repr)
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7])
def test_flow_sde_converges_to_the_data_law(schedule, noise):
    """First order in the step from t = 0.95. From t = 1, where g is infinite, only slowly: 2e-3 after 800 steps."""
    at = schedule(torch.tensor(0.95, dtype=torch.float64))
    start = (0.7 * float(at.alpha), 0.25 * float(at.alpha) ** 2 + float(at.sigma) ** 2)
    grids = [torch.linspace(0.95, 0, n + 1, dtype=torch.float64) for n in (400, 800, 1600)]
    coarse, middle, fine = (final_error(FlowSDE(noise), schedule, times, start) for times in grids)
    assert fine < 1e-3
    assert fine < 0.6 * middle < 0.6**2 * coarse
    assert final_error(FlowSDE(noise), schedule, TimeGrid(800).times(schedule), (0.0, 1.0)) < 2e-3


class Exact(torch.nn.Module):
    """The denoiser of N(0.7, 0.25)."""

    schedule = Cosine()

    def forward(self, x, t, cond=None):
        at = level(self.schedule, t, x)
        pulled = (x - at.alpha * 0.7) / (at.alpha**2 * 0.25 + at.sigma**2)
        return Prediction(0.7 + at.alpha * 0.25 * pulled, at.sigma * pulled)


def test_a_chain_without_noise_trains_no_policy_gradient():
    times = TimeGrid(5).times(Cosine())
    for kernel in (DDIM(0.0), FlowSDE(0.0)):
        assert not kernel.stochastic
        with pytest.raises(ConfigError, match="eta > 0"):
            require_stochastic(Policy(Exact(), kernel), times)
    for kernel in NOISY:
        assert require_stochastic(Policy(Exact(), kernel), times).tolist() == [True] * 4 + [False]


def test_a_deterministic_step_has_no_log_probability():
    assert Gaussian(torch.zeros(3, 2), torch.tensor(0.0)).log_prob(torch.zeros(3, 2)).isnan().all()
    to = Cosine()(torch.tensor(0.4, dtype=torch.float64))
    expected = (to.alpha.item(), to.sigma.item(), 0.0)
    assert coefficients(DDIM(0.0), Cosine(), 0.6, 0.4) == pytest.approx(expected, abs=1e-15)
