"""Kinds with parameters, the velocity mapping of handbook 2.4.5, and consistency boundary conditions."""

import math

import pytest
import torch
from diffusers import EDMEulerScheduler, LCMScheduler

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kinds import CM, EDM, InstaFlow, TrigFlow
from rlfusion.diffusion.parameterization import KINDS, convert, named, predict, solve, target
from rlfusion.diffusion.schedule import DDPM, VP, Cosine, Geometric, Karras, Rectified, Trig, ZeroSNR, level

PARAMETRIC = [InstaFlow(), TrigFlow(0.5), TrigFlow(), EDM(), EDM(1.3), CM()]
SCHEDULES = [VP(), ZeroSNR(), Rectified(1e-5), Trig(0.5), Karras(), Geometric()]


def pair(n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))


def at(schedule, t, like):
    return level(schedule, torch.as_tensor(t, dtype=torch.float64), like)


class Record(torch.nn.Module):
    """Keeps what it is asked, answers tanh(x + t)."""

    def forward(self, x, t, cond):
        self.x, self.t = x, t
        return torch.tanh(x + t.reshape(-1, 1, 1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", [*PARAMETRIC, "v_handbook"], ids=repr)
def test_target_then_predict_returns_the_pair(kind, schedule):
    x0, eps = pair()
    l = at(schedule, torch.linspace(0.02, 0.98, len(x0)), x0)
    x = l.alpha * x0 + l.sigma * eps
    got = predict(solve(kind, l), target(kind, x0, eps, l), x)
    torch.testing.assert_close(got.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.eps, eps, rtol=1e-6, atol=1e-6)  # CM, EDM at small sigma: error / sigma


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("source", ["v", "v_handbook", "InstaFlow", "TrigFlow", "EDM(sigma_data=1.0)", "flow"])
def test_any_kind_to_any_kind_also_at_the_ends(source, to, t):
    """Sources that are defined at both ends; the score at t = 0 and CM at alpha = 0 are not, even as targets."""
    x0, eps = pair()
    l = at(Trig(), t, x0)
    x = l.alpha * x0 + l.sigma * eps
    truth = target(to, x0, eps, l)
    got = convert(source, to, target(source, x0, eps, l), x, l)
    if (to, t) in {("score", 0.0), ("CM", 1.0)}:
        assert not truth.isfinite().any()
    else:
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [VP(), Cosine(), ZeroSNR()], ids=repr)
def test_velocity_mapping_of_handbook_2_4_5_both_ways(schedule):
    """Erratum 49: u = B v - x (b - a) and v = (u + x (b - a)) / B for any network's v, at alpha = 0 too."""
    v, x = pair()
    for t in (0.0, 0.2, 0.7, 1.0):
        l = at(schedule, t, x)
        B, gap = l.alpha + l.sigma, l.sigma - l.alpha
        u = convert("v_handbook", InstaFlow(), v, x, l)
        torch.testing.assert_close(u, B * v - x * gap)
        torch.testing.assert_close(convert(InstaFlow(), "v_handbook", u, x, l), (u + x * gap) / B)
        torch.testing.assert_close(convert("v", "v_handbook", v, x, l), -v)


def test_instaflow_recovers_both_unknowns_in_the_rescaled_space():
    """handbook 2.4.3: x0 = y + (1 - gamma) u, eps = y - gamma u, y = x / B, gamma = a / B."""
    u, x = pair()
    l = at(VP(), torch.linspace(0.01, 1, len(x)), x)
    y, gamma = x / (l.alpha + l.sigma), l.alpha / (l.alpha + l.sigma)
    got = predict(solve(InstaFlow(), l), u, x)
    torch.testing.assert_close(got.x0, y + (1 - gamma) * u)
    torch.testing.assert_close(got.eps, y - gamma * u)


def test_an_instaflow_network_is_a_rectified_flow_in_the_rescaled_space():
    _, x = pair()
    t, net = torch.tensor(0.4, dtype=torch.float64), Record()
    ours = Denoiser(net, VP(), InstaFlow())(x, t)
    B, r = float(VP()(t).alpha + VP()(t).sigma), float(VP()(t).sigma / (VP()(t).alpha + VP()(t).sigma))
    torch.testing.assert_close(net.x, x / B)
    assert net.t.tolist() == pytest.approx([r] * len(x))

    class Negative(torch.nn.Module):  # the flow kind, data at 0, is -u
        def forward(self, y, time, cond):
            return -Record()(y, time, cond)

    theirs = Denoiser(Negative(), Rectified(), "flow")(x / B, torch.tensor(r, dtype=torch.float64))
    torch.testing.assert_close(ours.x0, theirs.x0)
    torch.testing.assert_close(ours.eps, theirs.eps)


def test_edm_is_the_preconditioning_of_diffusers():
    reference, (y, x0) = EDMEulerScheduler(sigma_data=0.5), pair()
    reference.set_timesteps(10)
    for t, sigma in zip(torch.linspace(1, 0, 10, dtype=torch.float64), reference.sigmas):
        net, x = Record(), x0 + 3 * y
        got = Denoiser(net, Karras(), EDM())(x, t)
        torch.testing.assert_close(net.x, reference.precondition_inputs(x, sigma).double(), rtol=1e-5, atol=1e-6)
        assert net.t[0].item() == pytest.approx(float(reference.precondition_noise(sigma)), rel=1e-5, abs=1e-6)
        theirs = reference.precondition_outputs(x, net(net.x, net.t, None), sigma)
        torch.testing.assert_close(got.x0, theirs, rtol=1e-5, atol=1e-5)


def test_edm_target_has_unit_variance_on_data_of_its_sigma():
    x0, eps = 0.5 * torch.randn(2, 200_000, generator=torch.Generator().manual_seed(1)).double()
    for t in (0.0, 0.3, 0.6, 1.0):
        y = target(EDM(0.5), x0[None], 2 * eps[None], at(Karras(), t, x0[None]))
        assert y.std().item() == pytest.approx(1, abs=0.01)


def test_trigflow_is_the_printed_parameterization():
    """handbook 2.5 with sigma_data: V = sd F(x / sd, angle), f = cos x - sin V; V is dx / dangle."""
    F, x = pair()
    sd, t = 0.5, torch.tensor(0.37, dtype=torch.float64)
    angle, net = float(t) * math.pi / 2, Record()
    got = Denoiser(net, Trig(sd), TrigFlow(sd))(x, t)
    V = sd * net(x / sd, torch.full((len(x),), angle).double(), None)
    torch.testing.assert_close(got.x0, math.cos(angle) * x - math.sin(angle) * V)
    l = at(Trig(sd), t, x)
    flow = convert(TrigFlow(sd), "flow", F, x, l)
    torch.testing.assert_close(flow, math.pi / 2 * sd * F)


def test_the_boundary_condition_of_a_consistency_model():
    """f(x, t_min) = x whatever the network says; away from it f is the printed c_skip x + c_out F."""
    F, x = pair()
    start = predict(solve(CM(), at(Karras(), 0.0, x)), 1e3 * F, x)
    torch.testing.assert_close(start.x0, x, rtol=1e-12, atol=1e-10)
    l = at(Karras(), 0.5, x)
    sigma = float(l.sigma)
    skip, out = 0.25 / ((sigma - 0.002) ** 2 + 0.25), 0.5 * (sigma - 0.002) / math.sqrt(sigma**2 + 0.25)
    torch.testing.assert_close(predict(solve(CM(), l), F, x).x0, skip * x + out * F)
    truth = predict(solve(CM(), l), target(CM(), F, x, l), F + sigma * x)
    torch.testing.assert_close(truth.x0, F)


def test_lcm_scalings_and_boundary_are_those_of_diffusers():
    reference, model = LCMScheduler(), LCM(Denoiser(Record(), DDPM(), "eps"))
    for k in (0, 1, 19, 499, 999):
        skip, out = model.boundary(torch.tensor((k + 1) / 1000, dtype=torch.float64))
        theirs = reference.get_scalings_for_boundary_condition_discrete(k)
        assert (skip.item(), out.item()) == pytest.approx(theirs, rel=1e-12)
    _, x = pair()
    assert torch.equal(model(x, torch.tensor(0.001, dtype=torch.float64)).x0, x)
    p = model(x, torch.full((len(x),), 0.5, dtype=torch.float64))
    l = at(DDPM(), 0.5, x)
    torch.testing.assert_close(l.alpha * p.x0 + l.sigma * p.eps, x)
    assert not torch.allclose(p.x0, x)


def test_in_continuous_time_the_lcm_boundary_is_that_of_a_table_of_1000():
    table, flow = LCM(Denoiser(Record(), DDPM(), "eps")), LCM(Denoiser(Record(), Trig(), "v"))
    t = torch.tensor([0.001, 0.02, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(flow.boundary(t)), torch.stack(table.boundary(t)))
    assert flow.start == table.start == 0.001


@pytest.mark.parametrize("kind", PARAMETRIC, ids=repr)
def test_a_kind_is_read_back_from_its_text(kind):
    assert named(repr(kind)) == named(kind) == kind
    assert spec.parse(repr(kind), KINDS, "kind") == kind


@pytest.mark.parametrize(
    ("kind", "schedule", "t"), [("CM", Trig(), 1.0), ("CM", VP(), 0.0), ("EDM", ZeroSNR(), 1.0), ("EDM", VP(), 0.0)]
)
def test_what_is_undefined_is_refused(kind, schedule, t):
    _, x = pair()
    with pytest.raises(ValueError, match=f"kind '{kind}'"):
        Denoiser(Record(), schedule, kind)(x, torch.tensor(t, dtype=torch.float64))


@pytest.mark.parametrize("bad", ["EDM(sigma_data=0.0)", "CM(t_min=-1.0)", "TrigFlow(sigma_data=-1)", "EDM(sigma=1.0)"])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError, match="expected"):
        named(bad)
