"""AWM: its gradient against finite differences and a closed form, the noise in common, its fixed points, resuming."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import Capture, affine, class_walks, mlp
from rounding import ROUNDING
from scipy.optimize import brentq
from torch import nn

from rlfusion.agents.awm import Config, Learner
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.parameterization import target
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import DDPM, Rectified, level
from rlfusion.objectives.renoise import draws
from rlfusion.objectives.times import LAWS, of_chain
from rlfusion.objectives.weighting import MinSNR
from rlfusion.rl.agent import Plan
from rlfusion.rollout.trajectory import Trajectory

ONE = {"epochs": 1, "updates_per_epoch": 1, "noisings": 1, "micro_batch": 10**6}
MIDDLE = "Uniform(margin=0.4999)"
TIMES = torch.tensor([1.0, 0.0], dtype=torch.float64)


def given(x: torch.Tensor, reward: torch.Tensor, group: torch.Tensor | None = None) -> Trajectory:
    """Samples (n, *) with their rewards, of one prompt unless told."""
    group = torch.zeros(len(x), dtype=torch.int64) if group is None else group
    return Trajectory(x[:, None], TIMES, None, reward, group, None, 0, torch.ones(len(x), dtype=torch.int64))


def scored(n: int = 400, seed: int = 0) -> Trajectory:
    """Samples (n, 2) of N(0.3, 1) in four groups, rewarded by their first feature."""
    x = 0.3 + torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return given(x, x[:, 0].clone(), torch.arange(n) % 4)


def ends(policy, n: int = 48, seed: int = 0) -> Trajectory:
    """What workers keep of walks for it."""
    whole = class_walks(policy, n=n, seed=seed)
    begin = torch.full((n,), 4)
    return Trajectory(whole.x[:, -1:], whole.times, None, whole.reward, whole.group, whole.cond, 0, begin)


def put(policy, theta) -> None:
    with torch.no_grad():
        policy.denoiser.net.theta.copy_(torch.as_tensor(theta))


FORMS = [
    {},
    {"per": "sample", "clip_low": 0.02, "clip_high": 0.05, "dual_clip": 1.1},
    {"ratio": "sample", "kl_loss": 0.3},
    {"ratio": "sample", "per": "sample", "kl_loss": 0.3, "kl_of": "x0"},
    {"time_weight": "MinSNR(gamma=2.0)", "kl_loss": 0.2},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())) or "default")
def test_the_gradient_is_the_finite_difference_of_the_objective_in_float64(form):
    """Eq. (1) to (3), written out for a line y = theta_0 x + theta_1 that predicts eps."""
    batch, schedule, n, key = scored(40), DDPM(), 3, (7,)
    old, base, now = (0.4, 0.1), (0.3, 0.2), torch.tensor([0.5, -0.02], dtype=torch.float64)
    policy = affine(old, schedule, DDIM(0.0), "eps")
    config = Config(times="Uniform(margin=0.2)", **ONE | {"noisings": n, "micro_batch": 25} | form)
    learner, walks = Learner(policy, TIMES, config), torch.randperm(40, generator=torch.Generator().manual_seed(2))[:30]
    a = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = learner.losses(batch, walks, key)
    t, eps = draws((30 * n, 2), schedule, learner.times, key)
    x0 = batch.x[walks, 0].repeat_interleave(n, 0)
    l = level(schedule, t, x0)
    x, scale = l.alpha * x0 + l.sigma * eps, 2 if config.per == "sample" else 1
    weight = MinSNR(2.0)("eps", l).flatten() if "MinSNR" in config.time_weight else 1.0

    def y(theta) -> torch.Tensor:
        return theta[0] * x + theta[1]

    def loss_of(theta) -> torch.Tensor:
        return scale * (weight * (y(theta) - eps).square().mean(1)).reshape(30, n)

    def value(theta) -> float:
        log_ratio = loss_of(old) - loss_of(theta)
        log_ratio = log_ratio.mean(1, keepdim=True) if config.ratio == "sample" else log_ratio
        r, adv = log_ratio.exp().clamp(max=config.dual_clip), a[walks][:, None]
        surrogate = torch.minimum(r * adv, r.clamp(1 - config.clip_low, 1 + config.clip_high) * adv)
        gap = y(theta) - y(base)
        apart = gap * (l.sigma / l.alpha) if config.kl_of == "x0" else gap
        d = scale * apart.square().mean(1) * (1 if config.kl_of == "x0" else weight)
        return (-surrogate.mean() + config.kl_loss * d.mean()).item()

    torch.testing.assert_close(before, loss_of(old))
    put(policy, now)
    if learner.base is not None:
        put(learner.base, base)
    records = learner.accumulate(batch, a, walks, key, before)
    assert len(records) == 4, "30 samples, 8 in a call of 25"
    h = 1e-6
    difference = [(value(now + h * e) - value(now - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)]
    torch.testing.assert_close(policy.denoiser.net.theta.grad.tolist(), difference, rtol=1e-5, atol=1e-8)
    if form:
        return
    put(policy, old)
    found = learner.accumulate(batch, a, walks, key)
    assert all(not bool(record["log_ratio"].any()) for record in found)


def test_at_the_old_weights_the_expected_gradient_is_that_of_the_closed_form():
    """One time, t = 1/2: x_t = (x0 + eps) / 2 of x0 ~ N(m, 1), y = theta_0 x_t + theta_1 of x0, A = x0 - m.

    y - x0 = u A + v eps + k with u = theta_0 / 2 - 1, v = theta_0 / 2, k = theta_0 m / 2 + theta_1 - m, so that
    E[A (y - x0)] = u and E[A (y - x0) x_t] = (u m + k) / 2: A^3 and A eps have no mean.
    """
    m, theta, n = 0.7, (0.8, 0.2), 4000
    policy, g = affine(theta, Rectified(), DDIM(0.0), "x0"), torch.Generator().manual_seed(0)
    learner = Learner(policy, TIMES, Config(std="none", times=MIDDLE, **ONE))
    learner.optimization, found = Capture(policy), []
    for i in range(60):
        x0, learner.iteration = m + torch.randn(n, 1, generator=g, dtype=torch.float64), i
        learner.update(given(x0, x0[:, 0].clone()))
    found = torch.stack(learner.optimization.gradients)
    u, k = theta[0] / 2 - 1, theta[0] * m / 2 + theta[1] - m
    truth = torch.tensor([u * m + k, 2 * u])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) / (1 - 1 / n) - truth).abs() < 4 * error).all()
    assert (error < 0.05 * truth.abs()).all()


def test_old_and_new_losses_have_one_noise_and_one_time():
    """Equal weights have a ratio of exactly 1 at any later step; others' draws would not."""
    batch, policy = ends(mlp()), mlp()
    learner = Learner(policy, batch.times, Config(epochs=2, updates_per_epoch=2, micro_batch=7))
    learner.optimization = Capture(policy)
    told = learner.update(batch)
    assert told["log_ratio_max"] < 1e-6
    walks, parts = torch.arange(len(batch)), list(learner._parts(len(batch)))
    assert len({key for _, key in parts}) == 4
    one, other = (learner.losses(batch, walks, key) for _, key in parts[:2])
    assert (one - other).abs().max() > 0.1
    assert torch.equal(one, learner.losses(batch, walks, parts[0][1]))


def test_noise_in_common_is_what_makes_a_ratio():
    """The spread of log r over the noise, at equal calls: in common it is that of the change of the weights alone."""
    batch, policy = ends(mlp(), n=200), mlp()
    learner = Learner(policy, batch.times, Config())
    walks = torch.arange(len(batch))
    before, others = (learner.losses(batch, walks, (0, key)) for key in ("a", "b"))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.002 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    after = learner.losses(batch, walks, (0, "a"))
    assert (before - after).std() < 0.1 * (others - after).std()


class TwoModes(nn.Module):
    """E[x0 | x_t] of a mixture of N(-1, s^2) and N(1, s^2), whose log-odds are the only weight, by ``Rectified``."""

    def __init__(self, var: float = 0.05) -> None:
        super().__init__()
        self.logit, self.var = nn.Parameter(torch.zeros((), dtype=torch.float64)), var

    def forward(self, x, t, cond):
        a, b = (1 - t)[:, None], t[:, None]
        spread = a**2 * self.var + b**2
        p = torch.sigmoid(self.logit + 2 * a * x / spread)
        return (2 * p - 1) * (1 - a**2 * self.var / spread) + a * self.var / spread * x


def stationary(gap: float, kl: float) -> tuple[float, float]:
    """The log-odds at which the expected gradient is 0, by quadrature over t and x_t, and their exact tilt.

    A is +- gap / 2 by the mode, less its mean. y is affine in the posterior p of the upper mode, so Eq. (4) times
    dy / dlogit, both over the common factor, is  E_t,x_t k(t)^2 p (1 - p) [kl (p - p_base) - gap p (1 - p)].
    """
    var, t = 0.05, np.linspace(0.02, 0.98, 97)[:, None]
    x = np.linspace(-4, 4, 2001)[None]
    a, b = 1 - t, t
    spread = a**2 * var + b**2
    factor = (1 - a**2 * var / spread) ** 2

    def slope(logit: float) -> float:
        odds = 1 / (1 + np.exp(-logit))
        bells = [np.exp(-((x - a * m) ** 2) / (2 * spread)) / np.sqrt(spread) for m in (-1, 1)]
        density = (1 - odds) * bells[0] + odds * bells[1]
        p, p_base = (1 / (1 + np.exp(-(shift + 2 * a * x / spread))) for shift in (logit, 0.0))
        return float((density * factor * p * (1 - p) * (kl * (p - p_base) - gap * p * (1 - p))).sum())

    return brentq(slope, 0.0, 8.0), gap / kl


@pytest.mark.parametrize(("gap", "kl"), [(1.0, 2.0), (1.0, 0.7)])
def test_on_a_mixture_it_reaches_the_stationary_point_and_the_tilt_in_so_far_as_it_is_one(gap, kl):
    """Samples are the mixture's own; the weights are those that solve Eq. (4), not those of the exact tilt."""
    net = TwoModes()
    policy = Policy(Denoiser(net, Rectified(), "x0"), DDIM(0.0))
    settings = ONE | {"noisings": 2, "kl_loss": kl, "times": "Uniform(margin=0.02)"}
    config = Config(lr=0.02, std="none", ema_decay=0.0, **settings)
    learner, g, seen = Learner(policy, TIMES, config), torch.Generator().manual_seed(0), []
    for _ in range(400):
        upper = torch.rand(1000, generator=g, dtype=torch.float64) < net.logit.detach().sigmoid()
        mode = 2 * upper.double() - 1
        x0 = mode + math.sqrt(net.var) * torch.randn(1000, generator=g, dtype=torch.float64)
        learner.update(given(x0[:, None], gap / 2 * mode))
        seen.append(net.logit.item())
    reached, tilt = stationary(gap, kl)
    assert np.mean(seen[200:]) == pytest.approx(reached, abs=0.06)
    assert abs(reached - tilt) > 0.03 * kl**-2  # to first order alone
    assert stationary(0.05, 1.0)[0] == pytest.approx(0.05, rel=0.02)


def test_a_gaussian_under_a_linear_reward_is_held_at_its_exact_tilt():
    """N(0, 1) at t = 1/2: y_base = x_t, and of the tilt by exp(x0 / kl), N(1 / kl, 1), it is x_t + 1 / (2 kl)."""
    kl, g = 0.5, torch.Generator().manual_seed(0)
    policy = affine((1.0, 0.0), Rectified(), DDIM(0.0), "x0")
    learner = Learner(policy, TIMES, Config(std="none", kl_loss=kl, times=MIDDLE, **ONE))
    learner.optimization = Capture(policy)
    for tilt, at in ((0.5 / kl, 1 / kl), (0.25 / kl, 0.5 / kl)):
        put(policy, (1.0, tilt))
        learner.optimization.gradients.clear()
        for i in range(40):
            x0, learner.iteration = at + torch.randn(4000, 1, generator=g, dtype=torch.float64), i
            learner.update(given(x0, x0[:, 0].clone()))
        found = torch.stack(learner.optimization.gradients)
        off = (found.mean(0) / (found.std(0) / math.sqrt(40))).abs()
        assert (off < 4).all() if tilt == 0.5 / kl else (off > 20).any()


@pytest.mark.parametrize("ratio", ["noising", "sample"])
def test_micro_batches_do_not_change_the_gradient(ratio):
    gradients = []
    for size in (10**6, 14):
        policy = mlp().double()
        learner = Learner(policy, TIMES, Config(ratio=ratio, kl_loss=0.1, **ONE | {"micro_batch": size, "noisings": 4}))
        learner.optimization = Capture(policy)
        learner.update(ends(mlp().double()))
        gradients += learner.optimization.gradients
    torch.testing.assert_close(*gradients)


def test_the_times_of_the_chain_are_those_from_which_it_steps():
    times = TimeGrid(4).times(Rectified())
    law = of_chain(spec.parse("Chain()", LAWS, "times"), times)
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    found, count = law(u, Rectified()).unique(return_counts=True)
    assert torch.equal(found, times[:-1].sort().values)
    assert count.tolist() == [100] * 4
    assert of_chain(law, times) is law
    policy = mlp()
    learner = Learner(policy, times, Config(times="Chain()"))
    assert math.isfinite(learner.update(ends(policy))["loss"])


@pytest.mark.parametrize("settings", [{}, {"kl_loss": 0.1, "ratio": "sample", "epochs": 2}])
def test_a_saved_learner_continues_bit_for_bit(settings):
    config = Config(micro_batch=30, **settings)
    batches = [ends(mlp(), seed=i) for i in range(4)]
    straight, resumed = Learner(mlp(), TIMES, config, 5), Learner(mlp(seed=9), TIMES, config, 5)
    for batch in batches[:2]:
        straight.update(batch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    for mine, theirs in zip(straight.policy.parameters(), resumed.policy.parameters()):
        assert torch.equal(mine, theirs)
    assert straight.queries == resumed.queries == 4 * 48


def test_it_learns_and_tells_what_it_did():
    policy = mlp(kernel=DDIM(0.0))
    learner = Learner(policy, TIMES, Config(lr=3e-3, kl_loss=0.01, ema_decay=0.0))
    told = [learner.update(ends(policy, n=200, seed=i)) for i in range(15)]
    assert told[-1]["reward"] > told[0]["reward"] + 0.2
    assert told[0]["log_ratio_max"] > 0
    assert told[0]["kl"] < told[-1]["kl"]
    assert told[0]["matching"] > 0


def test_the_loss_told_is_a_feature_s_whatever_the_ratio_is_of():
    told = [Learner(mlp(), TIMES, Config(per=per, **ONE)).update(ends(mlp())) for per in ("feature", "sample")]
    assert told[0]["matching"] == pytest.approx(told[1]["matching"], rel=1e-5)


def test_bad_rewards_are_refused():
    policy = mlp()
    batch = ends(policy)
    batch.reward[2] = torch.inf
    with pytest.raises(NumericalError, match=r"\[2\]"):
        Learner(policy, TIMES, Config()).update(batch)


def test_a_network_that_answers_otherwise_each_time_is_refused_before_training():
    policy = mlp()
    learner = Learner(policy, TIMES, Config())
    assert learner.preflight(ends(policy))["log_ratio_max"] == 0
    policy.denoiser.net = nn.ModuleList([policy.denoiser.net, nn.Dropout(0.2)])
    policy.denoiser.net.forward = lambda x, t, c: policy.denoiser.net[1](policy.denoiser.net[0](x, t, c))
    with pytest.raises(NumericalError, match="the ratio is not 1 before the first update"):
        learner.preflight(ends(mlp()))


def test_what_is_compared_is_the_target_of_the_network_s_kind():
    policy, key = mlp().double(), (1,)
    batch = ends(policy)
    learner = Learner(policy, TIMES, Config(**ONE))
    t, eps = draws((48, 1, 3, 2), policy.schedule, learner.times, key)
    l = level(policy.schedule, t, batch.x[:, 0])
    x = l.alpha * batch.x[:, 0] + l.sigma * eps
    y = target("v", batch.x[:, 0], eps.double(), l)
    expected = (policy.denoiser.answer(x, t, batch.cond) - y).square().mean((1, 2, 3))
    torch.testing.assert_close(learner.losses(batch, torch.arange(48), key)[:, 0], expected.detach(), **ROUNDING)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(noisings=0), "noisings = 0"),
        (lambda: Config(noisings=9, micro_batch=8), "noisings = 9: .* at most micro_batch = 8"),
        (lambda: Config(clip_high=0), "clip_high = 0"),
        (lambda: Config(dual_clip=1.1), "dual_clip = 1.1"),
        (lambda: Config(kl_loss=-1), "kl_loss = -1"),
        (lambda: Config(times="Unifrm()"), "did you mean 'Uniform'"),
        (lambda: Config(times="Chian()"), "did you mean 'Chain'"),
        (lambda: Config(time_weight="SNRR()"), "did you mean 'SNR'"),
        (lambda: Config().check(Plan(10, 1, 0, 20)), "samples_per_prompt = 1"),
        (lambda: Config().check(Plan(1, 3, 0, 20)), "updates_per_epoch = 4"),
        (lambda: Config().check(Plan(10, 24, 1, 20)), "lag = 1: agent 'awm'"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_any_step_of_the_chain_will_do_and_none_is_looked_at():
    """Samples of a walk with noise and of one without have one loss: only x0 enters."""
    policy = mlp()
    batch = ends(policy)
    noisy = replace(batch, times=TimeGrid(9).times(policy.schedule))
    told = [Learner(mlp(), b.times, Config(**ONE)).update(b) for b in (batch, noisy)]
    assert told[0] == told[1]
