"""Schedules against their printed formulas, autodiff, finite differences, diffusers and 50-digit arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.schedule import DDPM, Cosine, Rectified, Trig, level

SCHEDULES = [DDPM(), DDPM(resolution=50, beta_start=1e-3, beta_end=0.2), Cosine(), Rectified(), Trig()]
VP = [s for s in SCHEDULES if not isinstance(s, Rectified)]
INSIDE = torch.linspace(0.01234, 0.98711, 41, dtype=torch.float64)  # off the knots k / T of the tables


def name(s) -> str:
    return repr(s)


@pytest.mark.parametrize("schedule", VP, ids=name)
def test_vp_has_unit_power(schedule):
    at = schedule(torch.linspace(0, 1, 1001, dtype=torch.float64))
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones(1001).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_ends(schedule):
    at = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert at.alpha[0].item() == pytest.approx(1, abs=1e-15)
    assert at.sigma[0] == 0
    assert not np.signbit(at.sigma[0].item())
    noise = at.alpha[1].item()
    assert noise == 0 if not isinstance(schedule, DDPM) else 0 < noise < 0.1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_alpha_falls_and_sigma_rises(schedule):
    at = schedule(torch.linspace(0, 1, 501, dtype=torch.float64))
    assert (at.alpha.diff() < 0).all()
    assert (at.sigma.diff() > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_derivatives_are_those_of_autodiff(schedule):
    t = INSIDE.clone().requires_grad_()
    at = schedule(t)
    for value, derivative in ((at.alpha, at.d_alpha), (at.sigma, at.d_sigma)):
        (truth,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_derivatives_at_the_ends_are_one_sided_differences(schedule):
    h = 1e-7
    low = schedule(torch.tensor([0.0, h, 2 * h], dtype=torch.float64))
    high = schedule(torch.tensor([1.0, 1 - h, 1 - 2 * h], dtype=torch.float64))

    def difference(v, sign):
        return sign * (-1.5 * v[0] + 2 * v[1] - 0.5 * v[2]) / h

    assert low.d_alpha[0].item() == pytest.approx(difference(low.alpha, 1).item(), rel=1e-5, abs=1e-6)
    assert high.d_alpha[0].item() == pytest.approx(difference(high.alpha, -1).item(), rel=1e-5, abs=1e-6)
    assert high.d_sigma[0].item() == pytest.approx(difference(high.sigma, -1).item(), rel=1e-5, abs=1e-6)
    if isinstance(schedule, Rectified | Trig):
        assert low.d_sigma[0].item() == pytest.approx(difference(low.sigma, 1).item(), rel=1e-5)
    else:  # sigma ~ sqrt(t)
        assert math.isinf(low.d_sigma[0].item())


def test_ddpm_table_is_the_product_of_one_minus_beta():
    beta = np.linspace(1e-4, 0.02, 1000)
    k = torch.arange(1001, dtype=torch.float64) / 1000
    at = DDPM()(k)
    np.testing.assert_allclose(at.alpha[1:] ** 2, np.cumprod(1 - beta), rtol=1e-12)
    np.testing.assert_allclose(at.sigma[1:] ** 2, 1 - np.cumprod(1 - beta), rtol=1e-9)


def test_ddpm_table_is_that_of_diffusers():
    table = DDPMScheduler(num_train_timesteps=1000).alphas_cumprod
    at = DDPM()(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close((at.alpha**2).float(), table, rtol=3e-6, atol=1e-7)


def test_ddpm_log_ab_is_linear_between_two_entries():
    at = DDPM()(torch.tensor([0.5, 0.50025, 0.5005, 0.501], dtype=torch.float64))
    log_ab = 2 * at.alpha.log()
    torch.testing.assert_close(
        log_ab[1:] - log_ab[0], (log_ab[3] - log_ab[0]) * torch.tensor([0.25, 0.5, 1.0]).double()
    )


def test_cosine_is_the_printed_formula():
    s = 0.008
    f = np.cos((INSIDE.numpy() + s) / (1 + s) * np.pi / 2) ** 2
    at = Cosine()(INSIDE)
    np.testing.assert_allclose(at.alpha**2, f / np.cos(s / (1 + s) * np.pi / 2) ** 2, rtol=1e-12)


def _exact_sigma(schedule, t: float) -> float:
    """sqrt(1 - ab) with 50 digits."""
    mpmath.mp.dps = 50
    if isinstance(schedule, Cosine):
        phi = [(mpmath.mpf(u) + mpmath.mpf(0.008)) / (1 + mpmath.mpf(0.008)) * mpmath.pi / 2 for u in (t, 0)]
        return float(mpmath.sqrt(1 - (mpmath.cos(phi[0]) / mpmath.cos(phi[1])) ** 2))
    if isinstance(schedule, Trig):
        return float(mpmath.sin(mpmath.pi * mpmath.mpf(t) / 2))
    return float(mpmath.sqrt(1 - (1 - mpmath.mpf(schedule.beta_start)) ** (mpmath.mpf(t) * schedule.resolution)))


@pytest.mark.parametrize("schedule", VP, ids=name)
def test_sigma_is_accurate_near_clean_data(schedule):
    for t in (1e-7, 1e-5, 3.3e-4):
        ours = schedule(torch.tensor(t, dtype=torch.float64)).sigma.item()
        assert ours == pytest.approx(_exact_sigma(schedule, t), rel=1e-12)


def test_level_broadcasts_a_time_over_features():
    like = torch.zeros(5, 3, 2, 2)
    assert level(Trig(), torch.tensor(0.5), like).alpha.shape == ()
    assert level(Trig(), torch.full((5,), 0.5), like).alpha.shape == (5, 1, 1, 1)
    assert level(Trig(), torch.full((5,), 0.5), like).alpha.dtype == torch.float64


@pytest.mark.parametrize("t", [[1.5], [-0.1], [float("nan")], [0.1, 0.2], [[0.1]]], ids=str)
def test_level_refuses_times_out_of_range_or_shape(t):
    with pytest.raises(ValueError, match="times"):
        level(Trig(), torch.tensor(t), torch.zeros(5, 3))


@pytest.mark.parametrize(
    "bad", [{"resolution": 0}, {"beta_start": 0.0}, {"beta_end": 1.0}, {"beta_start": 0.5}], ids=str
)
def test_ddpm_refuses_impossible_tables(bad):
    with pytest.raises(ConfigError, match="beta"):
        DDPM(**bad)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 50, 333, 1000])
def test_grid_is_that_of_diffusers(spacing, steps):
    reference = DDPMScheduler(timestep_spacing=spacing)
    reference.set_timesteps(steps)
    times = TimeGrid(steps, spacing).times(DDPM())
    if steps == 1 and spacing == "linspace":
        reference.timesteps = torch.tensor([0])  # both take the first entry of linspace
    assert ((times[:-1] * 1000).round().long() - 1).tolist() == reference.timesteps.tolist()
    assert times[-1] == 0
    assert len(times) == steps + 1


def test_grid_on_continuous_time_is_even_and_refuses_the_rest():
    torch.testing.assert_close(TimeGrid(4).times(Trig()), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())
    with pytest.raises(ConfigError, match="discrete"):
        TimeGrid(4, "leading").times(Trig())
    with pytest.raises(ConfigError, match="at most"):
        TimeGrid(51).times(DDPM(resolution=50))
    with pytest.raises(ConfigError, match="steps"):
        TimeGrid(0)
    with pytest.raises(ConfigError, match="did you mean 'leading'"):
        TimeGrid(4, "leeding")
