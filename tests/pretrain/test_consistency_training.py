"""Consistency training against truth: closed forms on N(m, lam), and finite differences.

On a variance-exploding path a function x0-hat = m + k (x - m) of N(m, lam) sees x_n - m = u + t_n e with Var u = lam,
Var e = 1. Whatever is of second order in (u, e) has its exact expectation over the four points (+-sqrt(lam), +-1):
the losses and gradients of affine functions below are expectations, not samples.
"""

import copy
import math

import numpy as np
import pytest
import torch
from backbones import NET, random_backbone
from consistency_parts import CM, LAM, TWO, UNLABELLED, M, Net, along, fixed_point, learner
from scipy.special import ndtr
from torch import nn

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine, Karras, Rectified, Trig
from rlfusion.diffusion.space import Pixels
from rlfusion.models.autoencoder import Latents
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.parts import fourier
from rlfusion.nets.unet import UNet
from rlfusion.pretrain import LOSSES, Draw, losses
from rlfusion.pretrain.consistency import (
    CT,
    ICT,
    Pair,
    decay,
    discrepancy,
    doubling_points,
    draw_index,
    points,
    probabilities,
    training_pair,
)
from rlfusion.pretrain.continuous import SCT, normalised, tangent
from rlfusion.pretrain.metrics import L2, LPIPS, PseudoHuber
from rlfusion.training import checkpoint

SD = 0.6
KARRAS = Karras(sigma_min=1e-4, sigma_max=80.0)


class Affine(nn.Module):
    """k x + b, for every time."""

    def __init__(self, k, b):
        super().__init__()
        self.k, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (k, b))

    def forward(self, x, t, cond):
        return self.k * x + self.b


def cube():
    """The four points: x0 and eps, (4, 1)."""
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    return M + LAM**0.5 * sign[:, :1], sign[:, 1:]


def draw_of(x0, eps, u, step=0, total=1):
    u = torch.full((len(x0),), u, dtype=torch.float64) if isinstance(u, float) else u
    return Draw(x0, None, eps, u, step, total, (0, "test", step), x0, *UNLABELLED)


def exact(schedule=KARRAS):
    """The consistency function of N(m, lam): m + sqrt((lam + t_0^2) / (lam + t^2)) (x - m)."""

    def f(x, t):
        sigma = schedule(t).sigma
        return M + ((LAM + schedule.sigma_min**2) / (LAM + sigma**2)).sqrt() * (x - M)

    return Denoiser(Net(f), schedule, "x0")


def gradient(denoiser, loss):
    grads = torch.autograd.grad(loss, list(denoiser.net.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


# Schedules of the grid


def test_points_and_decay_of_ct_by_hand():
    assert [points(k, 1000, 2, 150) for k in (0, 500, 1000)] == [2, 107, 151]  # sqrt(151^2/2 + 2) = 106.79
    assert decay(2, 2, 0.9) == pytest.approx(0.9)
    assert decay(107, 2, 0.9) == pytest.approx(0.9 ** (2 / 107))
    loss = CT(s0=2, s1=150, mu0=0.9)
    assert loss.teacher_decay(500, 1000) == pytest.approx(0.9 ** (2 / 107))
    assert ICT().teacher_decay(500, 1000) is None


def test_points_of_ict_by_hand():
    found = [doubling_points(k, 1000, 10, 80) for k in (0, 249, 250, 499, 500, 750, 1000)]
    assert found == [11, 11, 21, 21, 41, 81, 81]  # K' = 1000 / (log2 8 + 1) = 250
    assert doubling_points(999, 1000, 10, 50) == 51  # 40, then 50: s1 / s0 is rounded down


def test_ict_draws_its_noise_levels_with_the_papers_probabilities():
    tau = Karras()(torch.linspace(0, 1, 12, dtype=torch.float64)).sigma
    edges = ndtr((np.log(tau.numpy()) + 1.1) / 2.0)
    want = np.diff(edges) / (edges[-1] - edges[0])
    p = probabilities(tau, -1.1, 2.0)
    np.testing.assert_allclose(p.numpy(), want, rtol=1e-9)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    share = draw_index(u, p).bincount(minlength=11) / 100_000
    np.testing.assert_allclose(share.numpy(), want, atol=2e-5)
    tenths = torch.full((10,), 0.1, dtype=torch.float64)  # their sum is below 1 in floating point
    assert draw_index(torch.ones(1, dtype=torch.float64), tenths).item() == 9
    with pytest.raises(ConfigError, match="no noise level"):
        probabilities(tau, 1000.0, 0.1)


class Seen(nn.Module):
    """Records the times and points that the network reads."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, cond):
        self.calls.append((x.detach().clone(), t.clone()))
        return torch.zeros_like(x)


def test_ct_compares_neighbours_of_the_karras_grid_with_one_x0_and_one_noise():
    seen, schedule = Seen(), Karras()
    x0, eps = torch.randn(9, 2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    u = (torch.arange(9, dtype=torch.float64) + 0.5) / 9
    u[-1] = 1.0  # where a quantile rounds to 1
    CT(s0=10, s1=20)(*[Denoiser(seen, schedule, "x0")] * 2, draw_of(x0, eps, u))
    (x_s, s), (x_t, t) = seen.calls  # the teacher is called first
    i = torch.arange(10, dtype=torch.float64)
    grid = (0.002 ** (1 / 7) + i / 9 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule(s).sigma, grid[:-1])
    torch.testing.assert_close(schedule(t).sigma, grid[1:])
    torch.testing.assert_close(x_s, x0 + grid[:-1, None] * eps)
    torch.testing.assert_close(x_t, x0 + grid[1:, None] * eps)


def test_ict_weighs_by_the_inverse_of_the_step():
    schedule, x0 = Karras(), torch.zeros(2, 1, dtype=torch.float64)
    loss, eps = ICT(s0=4, s1=4, metric="L2()"), torch.ones(2, 1, dtype=torch.float64)
    tau = schedule(torch.linspace(0, 1, 5, dtype=torch.float64)).sigma
    p = probabilities(tau, -1.1, 2.0)
    u = torch.stack([p[0] / 2, p[:3].sum() + p[3] / 2])  # the first and the last interval
    identity = Denoiser(Net(lambda x, t: x), schedule, "x0")
    steps = tau.diff()[[0, 3]]
    torch.testing.assert_close(loss(identity, identity, draw_of(x0, eps, u)), steps**2 / steps)


# The loss and its gradient on a Gaussian


def test_ct_loss_at_the_exact_consistency_function():
    x0, eps = cube()
    n = 5000
    for u in (0.35, 0.5, 0.65, 0.9):
        loss = CT(s0=2, s1=n)(exact(), exact(), draw_of(x0, eps, u, step=1)).mean()
        at = math.floor(u * n)
        low, high = KARRAS(torch.tensor([at, at + 1], dtype=torch.float64) / n).sigma.tolist()
        middle = (low + high) / 2
        want = LAM**2 * (high - low) ** 2 / (LAM + middle**2) ** 2
        assert loss.item() == pytest.approx(want, rel=2e-3)


def pairs(t, s, x0, eps):
    """The pair of CT, and that of distillation by one Euler step with the exact score, at ratios t > s."""
    x_t, x_s = x0 + t * eps, x0 + s * eps
    euler = x_t - (t - s) * t * (x_t - M) / (LAM + t**2)
    time = [torch.full((len(x0),), _time(r), dtype=torch.float64) for r in (t, s)]
    return Pair(x_t, time[0], x_s, time[1]), Pair(x_t, time[0], euler, time[1])


def _time(sigma):
    low, high = (s ** (1 / KARRAS.rho) for s in (KARRAS.sigma_min, KARRAS.sigma_max))
    return (sigma ** (1 / KARRAS.rho) - low) / (high - low)


def test_the_stop_gradient_gradient_is_that_of_distillation_with_the_exact_score():
    """Theorem 2.2 as erratum 34 reads it: exactly, for an affine f, at any step; the losses themselves differ."""
    denoiser, (x0, eps) = Denoiser(Affine(0.4, 0.1), KARRAS, "x0"), cube()
    training, distillation = (discrepancy(denoiser, denoiser, p, None, L2()).mean() for p in pairs(1.2, 0.8, x0, eps))
    gap = training - distillation
    assert gap.item() == pytest.approx(0.4**2 * 0.4**2 * LAM / (LAM + 1.2**2), rel=1e-9)  # k^2 dt^2 Var(eps | x_t)
    torch.testing.assert_close(gradient(denoiser, training), gradient(denoiser, distillation), rtol=0, atol=1e-13)
    wrong = pairs(1.2, 0.8, x0, eps)[0]._replace(x_s=x0 - 0.8 * eps)
    other = discrepancy(denoiser, denoiser, wrong, None, L2()).mean()
    assert (gradient(denoiser, other) - gradient(denoiser, distillation)).norm() > 0.1


def test_the_goal_is_the_teachers_and_takes_no_gradient():
    denoiser, teacher = (Denoiser(Affine(*c), KARRAS, "x0") for c in ((0.4, 0.1), (0.9, -0.3)))
    x0, eps = cube()
    sigma = KARRAS(torch.tensor([0.5, 0.75], dtype=torch.float64)).sigma
    want = (0.4 * (x0 + sigma[1] * eps) + 0.1 - 0.9 * (x0 + sigma[0] * eps) + 0.3).square().flatten()
    for loss, weight in ((CT(s0=4, s1=4), 1.0), (ICT(s0=4, s1=4, metric="L2()"), 1 / (sigma[1] - sigma[0]))):
        tau = KARRAS(torch.linspace(0, 1, 5, dtype=torch.float64)).sigma
        u = 0.7 if isinstance(loss, CT) else probabilities(tau, -1.1, 2.0).cumsum(0)[1:3].mean().item()
        step = 0 if isinstance(loss, ICT) else 1
        value = loss(denoiser, teacher, draw_of(x0, eps, u, step=step))
        torch.testing.assert_close(value, weight * want)
        value.sum().backward()
    assert teacher.net.k.grad is None


def test_for_a_curved_f_the_gradients_agree_to_the_second_order_of_the_step():
    nodes, weight = np.polynomial.hermite_e.hermegauss(40)
    u, e = (torch.from_numpy(g).reshape(-1, 1) for g in np.meshgrid(nodes, nodes))
    weight = torch.from_numpy(np.outer(weight, weight) / weight.sum() ** 2).flatten()
    torch.manual_seed(0)
    curved = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    denoiser, gaps = Denoiser(Net(lambda x, t: curved(x)), KARRAS, "x0"), []
    denoiser.net.inner = curved  # where its parameters are found
    for dt in (0.1, 0.05):
        both = [discrepancy(denoiser, denoiser, p, None, L2()) @ weight for p in pairs(1, 1 - dt, M + LAM**0.5 * u, e)]
        first, second = (gradient(denoiser, loss) for loss in both)
        gaps.append(((first - second).norm() / second.norm()).item())
    assert gaps[0] < 0.1
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2)  # of gradients that are themselves O(dt)


def test_at_the_fixed_point_of_a_grid_the_gradient_is_zero_and_the_loss_its_floor():
    n = 12
    time = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    k, floor = fixed_point(KARRAS(time).sigma.numpy())
    slope = nn.Parameter(torch.from_numpy(k))

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = slope

        def forward(self, x, t, cond):
            return M + self.slope[(t * n).round().long()][:, None] * (x - M)

    denoiser, (x0, eps) = Denoiser(Table(), KARRAS, "x0"), cube()
    for i in range(n):
        loss = CT(s0=2, s1=n)(denoiser, denoiser, draw_of(x0, eps, (i + 0.5) / n, step=1)).mean()
        assert loss.item() == pytest.approx(floor[i], rel=1e-8)
        assert gradient(denoiser, loss).abs().max() < 1e-9 * max(1.0, KARRAS(time).sigma[i + 1].item())
    assert abs(fixed_point(KARRAS(torch.linspace(0, 1, 4001)).sigma.numpy())[0][-1] * 80 / LAM**0.5 - 1) < 0.01


def test_both_calls_draw_the_same_dropout():
    net = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 6))
    denoiser = Denoiser(Net(lambda x, t: net(x)), Karras(), "x0")
    x, t = torch.randn(5, 6), torch.full((5,), 0.4, dtype=torch.float64)
    torch.manual_seed(1)
    assert discrepancy(denoiser, denoiser, Pair(x, t, x, t), None, L2()).abs().max() == 0
    after = torch.rand(1)
    torch.manual_seed(1)
    first, second = net(x), torch.rand(1)
    assert not torch.equal(net(x), first)
    assert torch.equal(after, second)


# Metrics


def test_l2_and_pseudo_huber_by_hand():
    x, y = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]]), torch.zeros(2, 2, 2)
    torch.testing.assert_close(L2()(x, y), torch.tensor([25 / 4, 0.0]))
    torch.testing.assert_close(PseudoHuber(c=1.0)(x, y), torch.tensor([29.0**0.5 - 2, 0.0]))
    assert PseudoHuber().c == 0.00054
    x.requires_grad_()
    PseudoHuber()(x, y).sum().backward()
    torch.testing.assert_close(x.grad[0], torch.tensor([[0.6, 0.0], [0.0, 0.8]]))


def test_lpips_is_that_of_its_authors_package(tmp_path):
    file, theirs = random_backbone(tmp_path)
    ours = LPIPS(net=NET, weights=str(file), size=64)
    ours.check(Pixels())
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), rtol=1e-4, atol=1e-5)
    small, other = torch.rand(2, 1, 8, 8) * 2 - 1, (torch.rand(2, 1, 8, 8) * 2 - 1).requires_grad_()
    grown = [nn.functional.interpolate(v.repeat(1, 3, 1, 1), size=(64, 64), mode="bilinear") for v in (small, other)]
    value = ours(small, other)
    torch.testing.assert_close(value, theirs(*grown).flatten(), rtol=1e-4, atol=1e-5)
    assert ours.fit(small).shape == (2, 3, 64, 64)
    assert ours.fit(torch.zeros(1, 3, 32, 40)).shape == (1, 3, 64, 80)
    value.sum().backward()
    assert other.grad.norm() > 0


def test_lpips_names_what_it_needs(tmp_path):
    with pytest.raises(ConfigError, match=r"vgg16-397923af\.pth"):
        LPIPS(weights=str(tmp_path / "none.pth")).check(Pixels())
    with pytest.raises(ConfigError, match="did you mean 'squeeze'"):
        LPIPS(net="squeez")
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        LPIPS().fit(torch.zeros(2, 2, 8, 8))
    pytest.importorskip("lpips")
    (tmp_path / "wrong.pth").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="does not hold the weights"):
        LPIPS(net="squeeze", weights=str(tmp_path / "wrong.pth")).check(Pixels())
    with pytest.raises(ConfigError, match="latents"):
        LPIPS().check(Latents(nn.Identity(), {}))


# Continuous time


def networks():
    torch.manual_seed(0)
    mlp = ResidualMLP((1, 4, 4), 3, width=16, depth=2, frequency=8.0)
    unet = UNet((1, 4, 4), 3, width=8, multipliers=(1, 2), depth=1, attention=(1,), frequency=8.0, recompute=True)
    for net in (mlp, unet):
        for p in net.double().parameters():
            nn.init.normal_(p, std=0.2)  # no part may be 0, as it is at the start
    return {"ResidualMLP": mlp, "UNet": unet}


def trig(net):
    return Denoiser(net, Trig(sigma_data=SD), f"TrigFlow(sigma_data={SD})")


def slope(denoiser, x0, z, a, cond, h=1e-4):
    """df/da by central differences of the denoiser's own x0."""
    (up, _, t_up), (down, _, t_down) = along(x0, z, a + h), along(x0, z, a - h)
    return (denoiser(up, t_up, cond).x0 - denoiser(down, t_down, cond).x0) / (2 * h)


@pytest.mark.parametrize("name", ["ResidualMLP", "UNet"])
def test_the_tangent_is_the_derivative_of_f_for_each_network(name):
    denoiser, cond = trig(networks()[name]), torch.tensor([0, 1, 2, 3])
    x0, z = torch.randn(2, 4, 1, 4, 4, dtype=torch.float64)
    a = torch.tensor([0.1, 0.6, 1.1, 1.5], dtype=torch.float64)
    x, dx, t = along(x0, SD * z, a)
    cos = a.cos().reshape(-1, 1, 1, 1)
    want = cos * slope(denoiser, x0, SD * z, a, cond)
    with torch.no_grad():
        got = tangent(denoiser, x, dx, t, cond)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        none = tangent(denoiser, x, dx, t, cond, share=0.0)
        torch.testing.assert_close(none, -(cos**2) * (SD * denoiser.answer(x, t, cond) - dx))
        half = tangent(denoiser, x, dx, t, cond, share=0.5)
        torch.testing.assert_close(half, (got + none) / 2)
    assert not got.requires_grad


def exact_trig():
    """TrigFlow's network whose f is the exact one of N(m, lam): V = (cos a x - f) / sin a."""

    def answer(x, a):
        x, cos, sin = SD * x, a.cos(), a.sin()
        f = M + (LAM / (cos**2 * LAM + sin**2 * SD**2)).sqrt() * (x - cos * M)
        return (cos * x - f) / sin / SD

    return trig(Net(answer))


def test_the_tangent_at_the_exact_consistency_function():
    """Finite differences; 0 along the probability flow; 0 in expectation given x along the training path."""
    denoiser, (x0, eps) = exact_trig(), cube()
    for angle in (0.1, 0.7, 1.3):
        a = torch.full((4,), angle, dtype=torch.float64)
        x, dx, t = along(x0, SD * eps, a)
        g = tangent(denoiser, x, dx, t)
        torch.testing.assert_close(g, math.cos(angle) * slope(denoiser, x0, SD * eps, a, None), rtol=1e-6, atol=1e-8)
        assert g.abs().min() > 1e-3
        cos, sin = math.cos(angle), math.sin(angle)
        rest = x - cos * M
        assert abs((g * rest).mean()) < 1e-12
        assert abs(g.mean()) < 1e-12
        flow = -sin * M + sin * cos * (SD**2 - LAM) * rest / (cos**2 * LAM + sin**2 * SD**2)
        assert tangent(denoiser, x, flow, t).abs().max() < 1e-12


def test_the_tangent_is_normalised_a_sample():
    g = torch.tensor([[[3.0], [4.0]], [[0.0], [0.0]]])
    torch.testing.assert_close(normalised(g, 0.5), torch.tensor([[[3 / 5.5], [4 / 5.5]], [[0.0], [0.0]]]))


def test_discrete_gradients_tend_to_twice_the_continuous_one():
    """Erratum 54, with w = 1 / (sd tan a); a large c leaves SCT with g / c."""
    denoiser, cond = trig(networks()["ResidualMLP"]), torch.tensor([0, 1, 2, 3])
    x0, eps = torch.randn(2, 4, 1, 4, 4, dtype=torch.float64)
    c, d, u = 1e7, 16, torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64)
    loss = SCT(times="Uniform()", rise=0, c=c)
    draw = Draw(x0, cond, eps, u, 0, 1, (0,), x0, *UNLABELLED)
    continuous = gradient(denoiser, loss(denoiser, denoiser, draw).mean()) * c * d / 2
    gaps = []
    for da in (2e-3, 1e-3):
        pair = training_pair(denoiser.schedule, x0, eps, u, u - da * 2 / math.pi)
        weight = 1 / (SD * (u * math.pi / 2).tan())
        discrete = gradient(denoiser, (weight * d * discrepancy(denoiser, denoiser, pair, cond, L2())).mean()) / da
        gaps.append(((discrete - 2 * continuous).norm() / continuous.norm()).item())
    assert gaps[1] < 0.02
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)


def test_the_gradient_of_sct_is_that_of_its_normalised_tangents():
    denoiser, cond = trig(networks()["ResidualMLP"]), torch.tensor([0, 1, 2, 3])
    x0, eps = torch.randn(2, 4, 1, 4, 4, dtype=torch.float64)
    u = torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64)
    loss = SCT(times="LogNormal(mean=-1.0, std=1.4)", rise=100, c=0.1)
    value = loss(denoiser, denoiser, Draw(x0, cond, eps, u, 25, 1000, (0,), x0, *UNLABELLED))
    tan = (-1.0 + 1.4 * torch.special.ndtri(u)).exp() / SD
    x, dx, t = along(x0, SD * eps, tan.atan())
    g = tangent(denoiser, x, dx, t, cond, share=0.25)
    g = g / (g.flatten(1).norm(dim=1) + 0.1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(value, g.square().flatten(1).mean(1))
    want = gradient(denoiser, -(denoiser.answer(x, t, cond) * g).flatten(1).sum(1).mean()) * 2 / 16
    torch.testing.assert_close(gradient(denoiser, value.mean()), want, rtol=1e-7, atol=1e-12)
    assert [SCT(rise=100).share(k) for k in (0, 50, 100, 500)] == [0, 0.5, 1, 1]
    assert SCT(rise=0).share(0) == 1


def test_the_largest_frequency_of_time_is_a_setting():
    t = torch.tensor([0.25], dtype=torch.float64)
    want = [math.sin(0.25), math.sin(0.25 * 9), math.cos(0.25), math.cos(0.25 * 9)]
    torch.testing.assert_close(fourier(t, 4, 9.0)[0], torch.tensor(want, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"frequency = 0\.5"):
        ResidualMLP((1, 2, 2), 1, frequency=0.5)


# The learner


def test_training_with_a_teacher_resumes_bit_for_bit(tmp_path):
    def new():
        return learner("CT(s0=2, s1=6)", *CM, TWO, steps=8, batch=16)

    whole, half = new(), new()
    for step in range(4):
        whole.update(step), half.update(step)
    checkpoint.save(tmp_path, 4, half.state_dict())
    resumed = new()
    resumed.load_state_dict(checkpoint.load(checkpoint.latest(tmp_path).path))
    for step in range(4, 8):
        assert whole.update(step) == resumed.update(step)
    for one, other in ((whole.denoiser, resumed.denoiser), (whole.teacher, resumed.teacher)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert not torch.equal(whole.teacher.net.leave.weight, whole.denoiser.net.leave.weight)


def test_the_teacher_follows_with_the_decay_of_its_step():
    one = learner("CT(s0=2, s1=30, mu0=0.5)", *CM, TWO, steps=8, batch=16)
    for step in range(3):
        before = copy.deepcopy(one.teacher.net.leave.weight)
        one.update(step)
        mu = decay(points(step, 8, 2, 30), 2, 0.5)
        want = mu * before + (1 - mu) * one.denoiser.net.leave.weight
        torch.testing.assert_close(one.teacher.net.leave.weight, want.detach())


@pytest.mark.parametrize(
    ("loss", "kind", "schedule", "said"),
    [
        ("CT()", "x0", Karras(), "expected x0 = x_t at t = 0"),
        ("CT()", "eps", Karras(), "expected x0 = x_t at t = 0"),  # off by sigma_min eps
        ("CT()", "CM(t_min=0.01)", Karras(), "expected x0 = x_t at t = 0"),
        ("ICT()", "EDM()", Karras(), "expected x0 = x_t at t = 0"),
        ("CT()", "eps", Cosine(), "no consistency function"),
        ("ICT()", "v", Cosine(), "0 < sigma / alpha < inf"),
        ("ICT(mean=900.0)", *CM, "no noise level"),
        ("SCT()", "TrigFlow(sigma_data=0.5)", Trig(), "of one sigma_data"),
        ("SCT()", "v", Cosine(), "of one sigma_data"),
        ("CT(metric='LPIPS(weights=\"none\")')", *CM, "LPIPS"),
    ],
)
def test_what_has_no_consistency_function_is_refused(loss, kind, schedule, said):
    with pytest.raises(ConfigError, match=said):
        losses.make(loss).check(Denoiser(nn.Identity(), schedule, kind))


@pytest.mark.parametrize(
    "loss", ["CT(s0=1)", "CT(s0=9, s1=8)", "CT(mu0=1.0)", "ICT(s0=0)", "ICT(std=0.0)", "SCT(c=0.0)"]
)
def test_settings_that_cannot_work_are_refused(loss):
    with pytest.raises(ConfigError):
        losses.make(loss)
    assert set(LOSSES) >= {"CT", "ICT", "SCT"}


def test_where_the_boundary_holds_ct_may_be_trained():
    for kind, schedule in (CM, ("v", Cosine()), ("flow", Rectified())):
        denoiser = Denoiser(Net(lambda x, t: 0.5 * x), schedule, kind)
        CT().check(denoiser)
        x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
        torch.testing.assert_close(denoiser(x, torch.zeros(1, dtype=torch.float64)).x0, x, rtol=0, atol=1e-9)
