"""Distillation methods against truth, in float64: closed forms on Gaussians and mixtures, finite differences."""

import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from gaussian_teacher import DOUBLE, LAM, Gaussian, M, Table, draw_of, flow, points, times
from mixtures import Exact
from torch import nn

from rlfusion.data import Dataset
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Denoiser, Guided
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import DDPM, VP, Cosine, Rectified, Trig, diffused, level
from rlfusion.distill import cd, ct, lcm, pd, scd
from rlfusion.distill.consistency import Consistency, bounded, constant
from rlfusion.distill.guidance import AnyGuidance, Weighted
from rlfusion.distill.ode import along, ddim, heun
from rlfusion.models import Card, Config
from rlfusion.pretrain import Draws, Loss, LossLearner
from rlfusion.pretrain.continuous import SCT, normalised, tangent
from rlfusion.pretrain.metrics import L2, PseudoHuber

# The teacher's way along the ODE


@pytest.mark.parametrize("schedule", [Cosine(), VP(), Rectified()], ids=repr)
def test_ddim_is_the_kernel_with_times_of_each_sample(schedule):
    teacher, x = Exact(schedule, "v"), torch.randn(40, 2, 1, 1, dtype=DOUBLE)
    t = torch.linspace(0.2, 1.0, 40, dtype=DOUBLE)
    policy = Policy(teacher, DDIM(0.0))
    for s in (t - 0.2, t * 0.5):
        torch.testing.assert_close(ddim(teacher, x, t, s, None), policy(Observation(x, t, s)).mean)
    two = [t, t * 0.7, t * 0.4]
    torch.testing.assert_close(
        along(teacher, x, two, None), ddim(teacher, ddim(teacher, x, t, two[1], None), two[1], two[2], None)
    )


@pytest.mark.parametrize("schedule", [Cosine(), VP(), Rectified(), Trig(0.5)], ids=repr)
def test_heun_is_of_second_order_from_pure_noise_to_data(schedule):
    teacher, x = Gaussian(schedule, "x0"), points()
    first, last = (level(schedule, torch.tensor(t, dtype=DOUBLE), x) for t in (1.0, 0.02))

    def error(solver: str, steps: int) -> float:
        grid = times(*np.linspace(1.0, 0.02, steps + 1))
        return (along(teacher, x, grid, None, solver) - flow(x, first, last)).abs().max().item()

    assert 3.2 < error("heun", 24) / error("heun", 48) < 4.8
    assert 1.7 < error("ddim", 24) / error("ddim", 48) < 2.3
    to_data = times(1.0, 0.0)
    torch.testing.assert_close(heun(teacher, x, *to_data, None), ddim(teacher, x, *to_data, None))


# Progressive distillation


@pytest.mark.parametrize("schedule", [Cosine(), VP(), Rectified(), DDPM()], ids=repr)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.5), (0.6, 0.2), (0.5, 0.0), (1.0, 0.0)])
def test_one_step_with_the_target_is_two_steps_of_the_teacher(schedule, t, s):
    teacher, x = Exact(schedule, "v"), torch.randn(30, 2, 1, 1, dtype=DOUBLE)
    x_s = along(teacher, x, times(t, (t + s) / 2, s, n=30), None)
    at, to = (level(schedule, torch.tensor(time, dtype=DOUBLE), x) for time in (t, s))
    goal = pd.target(x, x_s, at, to)
    assert goal.x0.isfinite().all()
    assert goal.eps.isfinite().all()
    torch.testing.assert_close(diffused(*goal, to), x_s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffused(*goal, at), x, rtol=1e-9, atol=1e-9)
    if s == 0:
        torch.testing.assert_close(goal.x0, x_s)


def test_the_target_on_a_gaussian_in_closed_form():
    schedule, x, (t, mid, s) = Cosine(), points(), (0.8, 0.6, 0.4)
    ab = [float(schedule(torch.tensor(time, dtype=DOUBLE)).alpha) ** 2 for time in (t, mid, s)]
    at, to = (level(schedule, torch.tensor(time, dtype=DOUBLE), x) for time in (t, s))
    A, C = 1.0, 0.0  # x~ = A x_t + C, step by step
    for first, second in ((ab[0], ab[1]), (ab[1], ab[2])):
        a, b = first**0.5, (1 - first) ** 0.5
        var = a * a * LAM + b * b
        to_x0, to_eps, _ = oracles.ddim(first, second, 0.0)
        slope = to_x0 * a * LAM / var + to_eps * b / var
        A, C = slope * A, slope * (C - a * M) + to_x0 * M
    r = (1 - ab[2]) ** 0.5 / (1 - ab[0]) ** 0.5
    expected = ((A - r) * x + C) / (ab[2] ** 0.5 - r * ab[0] ** 0.5)
    moved = along(Gaussian(schedule), x, times(t, mid, s), None)
    torch.testing.assert_close(pd.target(x, moved, at, to).x0, expected)


class Off(Gaussian):
    """The exact x0 and a bit, as a student of a kind."""

    def answer(self, x, t, cond=None):
        l = level(self.schedule, t, x)
        p = Gaussian(self.schedule, "x0").answer(x, t) + 0.1 * x
        return p if self.kind == "x0" else l.alpha * (x - l.alpha * p) / l.sigma - l.sigma * p


@pytest.mark.parametrize("weight", ["TruncatedSNR()", "SNRPlusOne()"])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_the_loss_is_the_weighted_x0_error_for_every_kind(weight, kind):
    schedule, draw = Cosine(), draw_of()
    grid = torch.linspace(1, 0, 9, dtype=DOUBLE)
    loss = pd.Halving(weight=weight, teacher=Gaussian(schedule), grid=grid)(Off(schedule, kind), None, draw)
    j = 2 * (draw.u * 4).long()
    t, mid, s = (grid[j + k] for k in range(3))
    assert set(t.tolist()) == {1.0, 0.75, 0.5, 0.25}
    at, to = level(schedule, t, draw.x0), level(schedule, s, draw.x0)
    x = diffused(draw.x0, draw.eps, at)
    goal = pd.target(x, along(Gaussian(schedule), x, [t, mid, s], None), at, to)
    snr = (at.alpha / at.sigma).square()
    w = snr.clamp(min=1) if weight == "TruncatedSNR()" else snr + 1
    error = (goal.x0 - Off(schedule, "x0").answer(x, t)).square()
    torch.testing.assert_close(loss, (w * error).flatten(), rtol=1e-7, atol=1e-9)
    eps_error = (goal.eps - Off(schedule, kind)(x, t).eps).square()
    larger = torch.maximum(error, eps_error)
    if weight == "TruncatedSNR()":
        torch.testing.assert_close(loss, larger.flatten(), rtol=1e-7, atol=1e-9)
    jump = diffused(*goal, to) - diffused(*Off(schedule, kind)(x, t), to)  # of the step itself: handbook's loss
    r = to.sigma / at.sigma
    torch.testing.assert_close(jump.square(), (to.alpha - r * at.alpha).square() * error)


# Consistency, by the teacher and by the data


class Direct(Denoiser):
    """The network's answer is f itself, also at t = 0."""

    def forward(self, x, t, cond=None):
        f = self.net(x, t.expand(len(x)), cond)
        return Prediction(f, f)


def trained(move, intervals: int, steps: int = 1000) -> Table:
    """A table trained by Eq. (1) of ``distill.consistency`` through the learner of every method."""
    data = draw_of(4000)
    held = Dataset(data.x0, torch.zeros(4000, dtype=torch.int64), ("all",))
    student = Direct(Table(intervals), Cosine(), "x0")
    settings = cd.Config(batch=256, lr=2e-2, ema="Constant(decay=0.99)", max_grad_norm=100.0)
    draws = Draws(held, 256, 0.0, steps, torch.device("cpu"), 0, "test")
    loss = Consistency(move, (1, 0), *constant(intervals, 0.0), L2())
    learner = LossLearner(student, loss, draws, settings.optimization(student), 0)
    for step in range(steps):
        learner.update(step)
    learner.optimization.ema.settle()
    return student.net


def exact_table(intervals: int) -> torch.Tensor:
    """(k, b) of the consistency function of N(M, LAM) at the times of the table."""
    l = Cosine()(torch.arange(1, intervals + 1, dtype=DOUBLE) / intervals)
    k = (LAM / (l.alpha**2 * LAM + l.sigma**2)).sqrt()
    return torch.stack([k, M - k * l.alpha * M])


@pytest.mark.parametrize("name", ["cd", "cd heun", "ct"])
def test_training_ends_at_the_exact_consistency_function(name):
    """By the teacher to the steps' own error (first order for DDIM, second for Heun), by the data to first order."""
    intervals = 12
    move = {
        "cd": cd.by_teacher(Gaussian(Cosine()), "ddim"),
        "cd heun": cd.by_teacher(Gaussian(Cosine()), "heun"),
        "ct": ct.by_data(Cosine()),
    }[name]
    net = trained(move, intervals)
    found = torch.stack([net.k, net.b]).detach()
    gap = (found - exact_table(intervals)).abs().max().item()
    l = Cosine()(torch.arange(intervals + 1, dtype=DOUBLE) / intervals)
    var = l.alpha**2 * LAM + l.sigma**2
    if name == "ct":  # each row regresses the next on x_t: k_{n+1} = k_n Cov(x_n, x_{n+1}) / Var x_{n+1}
        fixed = ((l.alpha[1:] * l.alpha[:-1] * LAM + l.sigma[1:] * l.sigma[:-1]) / var[1:]).cumprod(0)
    else:  # the teacher's own steps, one after another
        x, step = torch.tensor([0.0, 1.0], dtype=DOUBLE).reshape(2, 1, 1, 1), []
        for n in range(1, intervals + 1):
            ends = times(*(torch.arange(n, -1, -1) / intervals).tolist(), n=2)
            moved = along(Gaussian(Cosine()), x, ends, None, "heun" if "heun" in name else "ddim").flatten()
            step.append(moved[1] - moved[0])
        fixed = torch.stack(step)
    torch.testing.assert_close(found[0], fixed, rtol=0, atol=0.02)
    assert gap < {"cd": 0.12, "cd heun": 0.06, "ct": 0.12}[name]


def test_the_target_takes_no_gradient_and_the_gradient_is_that_of_finite_differences():
    draw, net = draw_of(), Table(8)
    student, other = Direct(net, Cosine(), "x0"), Direct(Table(8), Cosine(), "x0")
    other.net.k.data.add_(0.05)
    loss = Consistency(cd.by_teacher(Gaussian(Cosine()), "ddim"), (2, 1, 0), *constant(8, 0.0), PseudoHuber(0.1))
    own = torch.autograd.grad(loss(student, student, draw).mean(), net.k)[0]
    held = Direct(Table(8), Cosine(), "x0")
    torch.testing.assert_close(own, torch.autograd.grad(loss(student, held, draw).mean(), net.k)[0])
    gradient = torch.autograd.grad(loss(student, other, draw).mean(), net.k)[0]
    for n in range(8):
        values = []
        for h in (1e-5, -1e-5):
            net.k.data[n] += h
            values.append(loss(student, other, draw).mean().item())
            net.k.data[n] -= h
        assert gradient[n].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


def test_the_pair_is_m_steps_of_the_teacher_over_the_grid():
    draw, teacher = draw_of(), Gaussian(Cosine())
    loss = Consistency(cd.by_teacher(teacher, "ddim"), (3, 2, 1, 0), *constant(8, 0.0), L2())
    pair = loss.pair(Direct(Table(8), Cosine(), "x0"), draw)
    assert sorted(set((pair.t * 8).tolist())) == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    torch.testing.assert_close(pair.t - pair.s, torch.full_like(pair.t, 3 / 8))
    way = [pair.t - k / 8 for k in range(4)]
    torch.testing.assert_close(pair.x_s, along(teacher, pair.x_t, way, None))
    torch.testing.assert_close(pair.x_t, diffused(draw.x0, draw.eps, level(Cosine(), pair.t, draw.x0)))


def test_at_the_exact_function_distillation_has_no_loss_and_training_has():
    """Eq. (1) of N(M, LAM): 0 but for the teacher's steps; by the data of the order of the step squared (34)."""

    class F(nn.Module):
        def forward(self, x, t, cond):
            l = level(Cosine(), t, x)
            return M + (LAM / (l.alpha**2 * LAM + l.sigma**2)).sqrt() * (x - l.alpha * M)

    student = Direct(F(), Cosine(), "x0")
    found = {}
    for intervals in (20, 40):
        for name, move in (("cd", cd.by_teacher(Gaussian(Cosine()), "heun")), ("ct", ct.by_data(Cosine()))):
            loss = Consistency(move, (1, 0), *constant(intervals, 0.0), L2())
            found[name, intervals] = loss(student, student, draw_of(400)).mean().item()
    assert found["cd", 40] < 1e-3 * found["ct", 40]
    assert found["ct", 20] / found["ct", 40] == pytest.approx(4, rel=0.3)


CARD = Card(Config("ResidualMLP(width=8, depth=1)", "Cosine()", "v"), (1, 2, 2), ("a", "b"))


def of(kind, schedule):
    return replace(CARD, config=Config(CARD.config.net, schedule, kind))


def test_the_boundary_is_put_where_it_is_needed_alone():
    assert bounded(of("v", "Cosine()"), "LCM()").boundary == ""
    assert bounded(of("flow", "Rectified()"), "LCM()").boundary == ""
    assert bounded(of("CM()", "Karras()"), "LCM()").boundary == ""
    assert bounded(of("x0", "Cosine()"), "LCM()").boundary == "LCM()"
    assert bounded(of("x0", "DDPM()"), "LCM(scaling=3.0)").boundary == "LCM(scaling=3.0)"
    assert lcm.Config().card(of("v", "Cosine()")).boundary == "LCM()"


# LCM


class Labelled(Gaussian):
    """An answer that depends on the label."""

    def answer(self, x, t, cond=None):
        return super().answer(x, t) + 0.3 * cond.to(x).reshape(-1, 1, 1, 1)


def test_any_guidance_is_guidance_at_the_weight_of_each_sample():
    teacher, x, label = Labelled(Cosine()), points(6), torch.zeros(6, dtype=torch.int64)
    w, t = torch.linspace(0, 3, 6, dtype=DOUBLE), torch.tensor(0.5, dtype=DOUBLE)
    ours = AnyGuidance(teacher, torch.tensor([1]))(x, t, {"label": label, "w": w})
    for row in range(6):
        one = Guided(teacher, w[row].item(), torch.tensor([1]))(x[row : row + 1], t, label[:1])
        torch.testing.assert_close(ours.x0[row : row + 1], one.x0)


def test_lcm_jumps_k_times_in_one_guided_step_by_hand():
    teacher, draw = Labelled(Cosine()), draw_of(8)
    student = LCM(Gaussian(Cosine()))
    move = cd.by_teacher(AnyGuidance(teacher, torch.tensor([1])), "ddim")
    loss = Consistency(move, (1, 0), *constant(50, 0.0), L2())
    w = torch.linspace(2, 14, 8, dtype=DOUBLE)
    pair = loss.pair(student, replace(draw, cond={"label": draw.cond, "w": w}))
    torch.testing.assert_close(pair.t - pair.s, torch.full_like(pair.t, 0.999 / 50))  # from t_0 = 0.001
    at, to = level(Cosine(), pair.t, draw.x0), level(Cosine(), pair.s, draw.x0)
    c, null = (teacher(pair.x_t, pair.t, draw.cond + k).x0 for k in (0, 1))
    scale = w.reshape(-1, 1, 1, 1)
    x0 = (1 + scale) * c - scale * null
    expected = to.alpha * x0 + to.sigma * (pair.x_t - at.alpha * x0) / at.sigma
    torch.testing.assert_close(pair.x_s, expected)


def test_the_weight_is_drawn_in_its_range_and_keyed_by_the_step():
    seen = []

    class Record(Loss):
        def __call__(self, denoiser, teacher, draw):
            seen.append(draw.cond["w"])
            return draw.u

    for step in (0, 0, 1):
        Weighted(Record(), 2.0, 14.0)(None, None, draw_of(step=step, total=2))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert 2 <= seen[0].min() < 2.5 < 13.5 < seen[0].max() <= 14


# sCD


SD = 0.5


class Trigonometric(nn.Module):
    """F of the exact consistency function of N(M, LAM) on Trig(SD), its slope off by ``off``; reads x / SD, angle."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.tensor(off, dtype=DOUBLE))

    def forward(self, x, a, cond):
        a = a.reshape(-1, 1, 1, 1)
        cos, sin, x = a.cos(), a.sin(), SD * x
        f = M + (LAM / (cos**2 * LAM + SD**2 * sin**2)).sqrt() * (x - cos * M)
        return (cos * x - f) / (SD * sin) + self.off * x


def test_at_the_exact_function_and_velocity_scd_stands_still():
    student = Denoiser(Trigonometric(0.0), Trig(SD), f"TrigFlow(sigma_data={SD})")
    loss = scd.SCD(SCT("Uniform(margin=0.05)", rise=0, c=1.0), Gaussian(Trig(SD)))
    assert loss(student, student, draw_of()).max().item() < 1e-18
    assert SCT("Uniform(margin=0.05)", rise=0, c=1.0)(student, student, draw_of()).mean().item() > 1e-3


def test_the_gradient_of_scd_is_the_limit_of_discrete_distillation():
    """2 sd tan a times: the squared error's gradient over the step of the angle (erratum 54), by an exact ODE step."""
    schedule, teacher = Trig(SD), Gaussian(Trig(SD))
    student = Denoiser(Trigonometric(0.3), schedule, f"TrigFlow(sigma_data={SD})")
    x0, eps, t, dt = M + LAM**0.5 * points(), points(seed=1), times(0.4)[0], 1e-5
    at, to = level(schedule, t, x0), level(schedule, t - dt, x0)
    x = diffused(x0, eps, at)
    with torch.no_grad():
        goal = student(flow(x, at, to), t - dt).x0
    discrete = (student(x, t).x0 - goal).square().mean()
    expected = torch.autograd.grad(discrete, student.net.off)[0] / (dt * math.pi / 2)
    p = teacher(x, t)
    dx = (at.d_alpha * p.x0 + at.d_sigma * p.eps) * (2 / math.pi)
    g = tangent(student, x, dx, t)
    ours = torch.autograd.grad(-(student.answer(x, t) * g).mean(), student.net.off)[0]
    factor = 2 * SD * math.tan(0.4 * math.pi / 2)
    assert (factor * ours).item() == pytest.approx(expected.item(), rel=1e-3)


def test_scd_regresses_on_the_normalised_tangent_of_the_teachers_velocity():
    student = Denoiser(Trigonometric(0.3), Trig(SD), f"TrigFlow(sigma_data={SD})")
    teacher, sct, draw = Gaussian(Trig(SD)), SCT("Uniform(margin=0.05)", rise=0, c=0.5), draw_of()
    at = sct.noised(student, draw)
    p = teacher(at.x, at.t)
    dx = (at.l.d_alpha * p.x0 + at.l.d_sigma * p.eps) * (2 / math.pi)
    g = normalised(tangent(student, at.x, dx, at.t), 0.5)
    y = student.answer(at.x, at.t)
    ours = torch.autograd.grad(scd.SCD(sct, teacher)(student, student, draw).mean(), student.net.off)[0]
    expected = torch.autograd.grad(-2 * (y * g).mean(), student.net.off)[0]
    torch.testing.assert_close(ours, expected)
