"""The table of kinds: every (kind, schedule) inverts; the conversions of handbook 2.6; what is refused."""

import pytest
import torch

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser, Guided
from rlfusion.diffusion.parameterization import KINDS, named, predict, solve, target
from rlfusion.diffusion.schedule import DDPM, Cosine, Rectified, Trig, level

SCHEDULES = [DDPM(), Cosine(), Rectified(), Trig()]


def batch(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_target_then_predict_returns_the_pair(kind, schedule):
    x0, eps = batch()
    at = level(schedule, torch.linspace(0.01, 0.99, len(x0)), x0)
    x = at.alpha * x0 + at.sigma * eps
    got = predict(solve(kind, at), target(kind, x0, eps, at), x)
    torch.testing.assert_close(got.x0, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(got.eps, eps, rtol=0, atol=1e-9)


def test_conversions_of_handbook_2_6():
    x0, eps = batch()
    at = level(Cosine(), torch.linspace(0.02, 0.98, len(x0)), x0)
    a, b = at.alpha, at.sigma
    x = a * x0 + b * eps
    v = b * x0 - a * eps  # the handbook's sign; ours, of Salimans & Ho, is -v
    torch.testing.assert_close(target("v", x0, eps, at), -v)
    torch.testing.assert_close(predict(solve("v", at), -v, x).x0, a * x + b * v)
    torch.testing.assert_close(predict(solve("v", at), -v, x).eps, b * x - a * v)
    torch.testing.assert_close(predict(solve("eps", at), eps, x).x0, (x - b * eps) / a)
    torch.testing.assert_close(predict(solve("x0", at), x0, x).eps, (x - a * x0) / b)
    torch.testing.assert_close(target("score", x0, eps, at), -eps / b)


def test_flow_target_is_the_velocity_of_the_path():
    x0, eps = batch()
    at = level(Rectified(), torch.linspace(0.02, 0.98, len(x0)), x0)
    torch.testing.assert_close(target("flow", x0, eps, at), eps - x0)
    t, h = torch.tensor(0.37041, dtype=torch.float64), 1e-6
    for schedule in SCHEDULES:
        hi, lo = (level(schedule, t + d, x0) for d in (h, -h))
        difference = ((hi.alpha - lo.alpha) * x0 + (hi.sigma - lo.sigma) * eps) / (2 * h)
        torch.testing.assert_close(target("flow", x0, eps, level(schedule, t, x0)), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "schedule", "t"),
    [
        ("eps", Cosine(), 1.0),
        ("score", Trig(), 1.0),
        ("x0", Trig(), 0.0),
        ("score", DDPM(), 0.0),
        ("flow", Cosine(), 0.0),
    ],
    ids=str,
)
def test_singular_levels_are_refused(kind, schedule, t):
    x0, _ = batch()
    with pytest.raises(ValueError, match=kind):
        solve(kind, level(schedule, torch.tensor(t), x0))


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "schedule"), [("v", Trig()), ("v", Cosine()), ("flow", Rectified()), ("flow", Trig())], ids=str
)
def test_v_and_flow_hold_at_both_ends(kind, schedule, t):
    x0, eps = batch()
    at = level(schedule, torch.tensor(t), x0)
    got = predict(solve(kind, at), target(kind, x0, eps, at), at.alpha * x0 + at.sigma * eps)
    torch.testing.assert_close(got.x0, x0)
    torch.testing.assert_close(got.eps, eps)


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'eps'"):
        named("epsi")
    with pytest.raises(ConfigError, match="eps2"):
        Denoiser(torch.nn.Identity(), Trig(), "eps2")


class Recorder(torch.nn.Module):
    def forward(self, x, t, cond):
        self.seen = (x.shape, t, cond)
        return cond[:, None, None] * x


def test_denoiser_hands_the_network_a_time_for_each_row():
    x = torch.ones(4, 2, 3)
    net = Recorder()
    Denoiser(net, Trig(), "v")(x, torch.tensor(0.25, dtype=torch.float64), torch.arange(4.0))
    shape, t, _ = net.seen
    assert shape == x.shape
    assert t.tolist() == [0.25] * 4
    assert t.dtype == x.dtype


def test_guidance_is_the_affine_combination_in_one_call():
    x, cond, t = torch.randn(4, 2, 3), torch.arange(4.0), torch.tensor(0.4, dtype=torch.float64)
    net = Recorder()
    plain = Denoiser(net, Trig(), "x0")
    guided = Guided(plain, 2.5, torch.tensor([7.0]))(x, t, cond)
    assert net.seen[0] == (8, 2, 3)
    with_c, without = plain(x, t, cond), plain(x, t, torch.full((4,), 7.0))
    for got, c, o in zip(guided, with_c, without):
        torch.testing.assert_close(got, c + 2.5 * (c - o), rtol=1e-5, atol=1e-5)
    assert torch.equal(Guided(plain, 0.0, torch.tensor([7.0]))(x, t.expand(4), cond).x0, with_c.x0)
