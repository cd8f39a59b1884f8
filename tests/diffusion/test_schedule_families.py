"""ScaledLinear, VP, ZeroSNR, Karras, Geometric, Movie Gen and TrigFlow: printed formulas, autodiff, diffusers."""

import math

import mpmath
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import (
    DDPM,
    VP,
    Geometric,
    Karras,
    Power,
    Rectified,
    ScaledLinear,
    ShiftedSNR,
    SquaredCosine,
    Trig,
    ZeroSNR,
)
from rlfusion.models import SCHEDULES as TABLE

PRESERVING = [ScaledLinear(), VP(), ZeroSNR(), ZeroSNR("ScaledLinear()"), ZeroSNR("VP()"), Trig()]
OTHERS = [Rectified(1e-5), Rectified(0.1), Trig(0.5), Karras(), Geometric()]
ALL = [*PRESERVING, *OTHERS]
ZERO = [s for s in ALL if isinstance(s, ZeroSNR)]
OF_SAMPLERS = [
    Power(),
    Power(20.0, 5.0),
    ShiftedSNR(),
    ZeroSNR("ShiftedSNR(scale=2.0)"),
    ZeroSNR("SquaredCosine()", 2**-12),
]
"""What published samplers alone are read as."""

INSIDE = torch.linspace(0.01234, 0.98711, 41, dtype=torch.float64)


def at(schedule, *t: float):
    return schedule(torch.tensor(t, dtype=torch.float64))


@pytest.mark.parametrize("schedule", [*ALL, *OF_SAMPLERS], ids=repr)
def test_derivatives_are_those_of_autodiff(schedule):
    t = INSIDE.clone().requires_grad_()
    l = schedule(t)
    for value, derivative in ((l.alpha, l.d_alpha), (l.sigma, l.d_sigma)):
        truth = torch.zeros_like(t)
        if value.requires_grad:
            (truth,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_snr_falls_and_its_text_is_read_back(schedule):
    l = schedule(torch.linspace(0, 1, 501, dtype=torch.float64))
    assert ((l.sigma / (l.alpha + l.sigma)).diff() > 0).all()
    assert spec.parse(repr(schedule), TABLE, "schedule") == schedule


@pytest.mark.parametrize("schedule", [*PRESERVING, *OF_SAMPLERS], ids=repr)
def test_vp_has_unit_power_and_begins_at_data(schedule):
    l = schedule(torch.linspace(0, 1, 1001, dtype=torch.float64))
    torch.testing.assert_close(l.alpha**2 + l.sigma**2, torch.ones(1001).double(), rtol=0, atol=1e-14)
    assert l.alpha[0].item() == pytest.approx(1, abs=1e-15)
    assert l.sigma[0] == 0


@pytest.mark.parametrize(
    ("schedule", "std"),
    [(Karras(), 80), (Geometric(), 50), (Trig(0.5), 0.5), (Trig(), 1), (Rectified(1e-5), 1), (ZeroSNR(), 1)],
    ids=str,
)
def test_a_chain_begins_with_the_noise_of_its_schedule(schedule, std):
    policy = Policy(Denoiser(torch.nn.Identity(), schedule, "x0"), DDIM(0.0))
    assert policy.prior_std(TimeGrid(4).times(schedule)) == pytest.approx(std, rel=1e-12)


def test_scaled_linear_is_the_table_of_stable_diffusion():
    reference = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    l = ScaledLinear()(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close((l.alpha**2).float(), reference.alphas_cumprod, rtol=3e-6, atol=1e-7)
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(l.alpha**2, np.cumprod(1 - beta), rtol=1e-12)


def test_vp_is_the_sde_and_the_limit_of_the_table():
    l = VP()(INSIDE)
    beta = 0.1 + INSIDE * 19.9
    torch.testing.assert_close(l.d_alpha / l.alpha, -beta / 2)  # the drift f of dx = f x dt + g dw
    g2 = 2 * l.sigma * l.d_sigma - 2 * l.d_alpha / l.alpha * l.sigma**2  # handbook-notes 2.1
    torch.testing.assert_close(g2, beta)
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)  # beta_k = beta(t) / T: DDPM's 1e-4 .. 0.02 at T = 1000
    torch.testing.assert_close(DDPM()(t).alpha.log(), VP()(t).alpha.log(), rtol=0.02, atol=0)


def test_vp_sigma_is_accurate_near_clean_data():
    mpmath.mp.dps = 50
    for schedule, t in ((VP(), 1e-9), (ZeroSNR("VP()"), 1e-9), (ZeroSNR("VP()"), 1e-4)):
        u = mpmath.mpf(t)
        alpha, end = (mpmath.exp(-(v * mpmath.mpf(0.1) + v**2 * mpmath.mpf(20 - 0.1) / 2) / 2) for v in (u, 1))
        if isinstance(schedule, ZeroSNR):
            alpha = (alpha - end) / (1 - end)
        assert at(schedule, t).sigma.item() == pytest.approx(float(mpmath.sqrt(1 - alpha**2)), rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_snr_tables_are_those_of_lin_et_al(name):
    ours, settings = {
        "linear": (ZeroSNR("DDPM()"), {}),
        "scaled_linear": (ZeroSNR("ScaledLinear()"), {"beta_start": 0.00085, "beta_end": 0.012}),
    }[name]
    betas = DDPMScheduler(beta_schedule=name, **settings).betas.double()
    reference = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    l = ours(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(l.alpha**2, reference, rtol=0, atol=1e-7)  # their betas are rounded to float32
    assert ours.resolution == 1000


@pytest.mark.parametrize("schedule", ZERO, ids=repr)
def test_zero_snr_ends_in_pure_noise(schedule):
    for l in (at(schedule, 1.0), schedule(torch.tensor(1.0, dtype=torch.float64))):
        assert l.alpha.item() == 0
        assert l.sigma.item() == 1
        assert l.d_alpha.item() < 0
        assert l.d_sigma.item() == 0
    near = at(schedule, 1 - 1e-7)
    assert near.alpha.item() == pytest.approx(-1e-7 * at(schedule, 1.0).d_alpha.item(), rel=1e-4)


def test_shifted_snr_and_a_last_signal_are_what_they_say():
    t = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    base, shifted = ScaledLinear()(t), ShiftedSNR("ScaledLinear()", 3.0)(t)
    torch.testing.assert_close((shifted.alpha / shifted.sigma) ** 2, (base.alpha / base.sigma) ** 2 / 3)
    for schedule in (ZeroSNR(), ZeroSNR("SquaredCosine()")):
        kept = ZeroSNR(schedule.base, 2**-12)
        assert all(torch.equal(a[:-1], b[:-1]) for a, b in zip(schedule(t), kept(t)))
        assert kept(t[-1:]).alpha.item() == 2**-12
    assert SquaredCosine()(t).alpha[-1] > 0


@pytest.mark.parametrize("steps", [5, 18, 40])
def test_karras_is_the_grid_of_edm(steps):
    reference = EDMEulerScheduler()  # sigma 0.002 .. 80, rho 7
    reference.set_timesteps(steps)
    sigma = Karras()(torch.linspace(1, 0, steps, dtype=torch.float64)).sigma
    torch.testing.assert_close(sigma.float(), reference.sigmas[:-1], rtol=2e-6, atol=0)


def test_geometric_has_a_constant_ratio_between_its_ends():
    sigma = Geometric()(torch.linspace(0, 1, 9, dtype=torch.float64)).sigma
    torch.testing.assert_close(sigma.log().diff(), torch.full((8,), math.log(5000) / 8).double())
    assert (sigma[0].item(), sigma[-1].item()) == (pytest.approx(0.01), pytest.approx(50))


def test_movie_gen_path_of_handbook_3_1_3():
    """y = u x0 + (1 - (1 - s) u) eps at their time u = 1 - t; dy/du = x0 - (1 - s) eps."""
    s, u = 1e-5, 1 - INSIDE
    l = Rectified(s)(INSIDE)
    torch.testing.assert_close(l.alpha, u)
    torch.testing.assert_close(l.sigma, 1 - (1 - s) * u)
    torch.testing.assert_close(-l.d_alpha, torch.ones_like(u))
    torch.testing.assert_close(-l.d_sigma, -(1 - s) * torch.ones_like(u))
    assert at(Rectified(s), 0.0).sigma.item() == s  # the noise that stays (erratum 59)


def test_trigflow_is_edm_rotated():
    """handbook-notes 2.5: x_trig = cos(t) x_edm at tan(t) = tau / sigma_data."""
    l = Trig(0.5)(INSIDE)
    torch.testing.assert_close(l.sigma / l.alpha, 0.5 * (INSIDE * math.pi / 2).tan())
    torch.testing.assert_close(l.alpha**2 * 0.25 + l.sigma**2, torch.full_like(INSIDE, 0.25))  # variance sigma_data^2


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScaledLinear(resolution=0),
        lambda: VP(beta_min=0.0),
        lambda: VP(beta_max=math.nan),
        lambda: ZeroSNR("Cosine()"),  # has zero terminal SNR already
        lambda: ZeroSNR("DDPN()"),
        lambda: ZeroSNR("DDPM(resolution=1)"),
        lambda: ZeroSNR(last=1.0),
        lambda: ShiftedSNR(scale=0.0),
        lambda: ShiftedSNR("VP()"),
        lambda: Power(rho=0.0),
        lambda: Karras(sigma_min=0.0),
        lambda: Karras(rho=0.0),
        lambda: Geometric(sigma_min=2.0, sigma_max=1.0),
        lambda: Rectified(sigma_min=1.0),
        lambda: Trig(sigma_data=0.0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()
