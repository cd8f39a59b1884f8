"""Q-score matching: gradients by finite differences, minimisers and laws in closed form, learning, resuming."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from chains import Affine, Capture, affine, class_walks, mlp
from interrupted_runs import assert_same, outcome, place
from mixtures import Exact
from passes import recording
from plane import ends, plane_data, plane_task
from processes import rlfusion
from tiny_runs import TINY
from torch import Tensor, nn

from rlfusion.agents.qsm import Config, Learner
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.common.weights import ADAPTER
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, Kernel, Langevin, Renoise
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import VP, Cosine, Geometric, Karras, Rectified, Trig, level
from rlfusion.models import lora
from rlfusion.nets.critic import Critic
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.objectives.renoise import SPAN, divergence, renoise
from rlfusion.objectives.times import TIMES
from rlfusion.objectives.weighting import WEIGHTS
from rlfusion.rl import qvalue
from rlfusion.rl.agent import Plan
from rlfusion.rl.critic import Mean, Regression, Soft, explained_variance, make_critic
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.optimization import Optimization

K, R = 4.0, 0.7
ONE = {"epochs": 1, "updates_per_epoch": 1, "noisings": 1, "micro_batch": 10**6, "scale": "none"}
MIDDLE = "Uniform(margin=0.4999999)"


def bowl(x: Tensor, cond: object = None) -> Tensor:
    """R(x) = -K |x - R|^2 / 2: exp(R) is N(R, 1 / K)."""
    return -K / 2 * (x.flatten(1) - R).square().sum(1)


def line(x: Tensor, cond: object = None) -> Tensor:
    """A linear reward."""
    return x.flatten(1).sum(1)


def task(policy: Policy, reward=bowl, shape=(1,), steps: int = 4, conditions: Tensor | None = None) -> Task:
    return Task(policy, TimeGrid(steps), shape, conditions, lambda x: x, reward, "a reward")


def batch(x: Tensor, reward: Tensor | None = None, cond: Tensor | None = None) -> Trajectory:
    """Samples x (n, *) as workers keep them."""
    group = torch.zeros(len(x), dtype=torch.int64) if cond is None else cond
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return Trajectory(x[:, None], times, None, reward, group, cond, 0, torch.ones(len(x), dtype=torch.int64))


def points(n: int = 60, seed: int = 0) -> Tensor:
    return 0.3 + torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Bend(nn.Module):
    """Stands where a critic does: sin(x + t)."""

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        return (x[:, 0] + t.to(x)).sin()


# The regression


@pytest.mark.parametrize("q", ["noised", "denoised", "learned"])
@pytest.mark.parametrize("form", ["score", "noise"])
@pytest.mark.parametrize(("anchor", "weight"), [(0.0, None), (0.6, "MinSNR(gamma=2.0)")])
def test_the_gradient_is_the_finite_difference_of_the_loss_as_the_paper_writes_it(q, form, anchor, weight):
    """In the score, or in -eps, with weights of their own: nothing here is shared with the code."""
    schedule, base, alpha = Cosine(), (0.4, 0.1), 0.3
    config = Config(
        q=q,
        form=form,
        alpha=alpha,
        anchor=anchor,
        weight=weight or {"score": "Score()", "noise": "SNR()"}[form],
        times="Uniform(margin=0.2)",
        **ONE | {"micro_batch": 25},
    )
    learner = Learner(task(affine(base, schedule, DDIM(1.0), "eps")), config)
    learner.q = Bend() if q == "learned" else learner.q
    held, rows, key = batch(points()), torch.arange(60), (7,)
    unit = torch.linspace(0.5, 1.5, 60, dtype=torch.float64)
    x, t, _ = renoise(held.x[:, 0], schedule, learner.times, key)
    l = level(schedule, t, x)
    slope = {
        "noised": -K * (x - R),
        "denoised": -K * ((x - l.sigma * (base[0] * x + base[1])) / l.alpha - R) * (1 - l.sigma * base[0]) / l.alpha,
        "learned": (x + t[:, None]).cos(),
    }[q] * unit[:, None]

    def loss(theta) -> float:
        ours, theirs = (-(at[0] * x + at[1]) / (l.sigma if form == "score" else 1) for at in (theta, base))
        error = (ours - anchor * theirs - alpha * slope).square()
        if weight:
            snr = (l.alpha / l.sigma).square()
            error = error * snr.clamp(max=2) / snr * (l.sigma.square() if form == "score" else 1)
        return error.mean().item()

    theta, h = torch.tensor([0.45, -0.2], dtype=torch.float64), 1e-6
    with torch.no_grad():
        learner.trained.denoiser.net.theta.copy_(theta)
    records = learner.accumulate(held, unit, rows, key)
    assert len(records) == 3, "60 samples, 25 in a call"
    wanted = [(loss(theta + h * e) - loss(theta - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)]
    torch.testing.assert_close(learner.trained.denoiser.net.theta.grad.tolist(), wanted, rtol=1e-5, atol=1e-8)
    asked = sum(len(record) > 0 for record in records) and (0 if q == "learned" else 60)
    assert learner.queries == asked


@pytest.mark.parametrize(("anchor", "through", "calls"), [(1.0, "base", 1), (1.0, "trained", 1), (0.0, "base", 1)])
def test_one_call_of_the_base_answers_for_q_and_for_the_anchor(anchor, through, calls):
    config = Config(q="denoised", anchor=anchor, through=through, **ONE)
    learner = Learner(task(affine((0.4, 0.1), Rectified(), DDIM(1.0), "eps")), config)
    with recording((Affine,)) as passes:
        learner.accumulate(batch(points()), torch.ones(60, dtype=torch.float64), torch.arange(60), (0,))
    assert sum(one.module is learner.base.denoiser.net for one in passes) == calls
    assert all(p.grad is None for p in learner.base.parameters())


@pytest.mark.parametrize("form", ["score", "noise"])
def test_at_its_minimiser_the_gradient_is_zero_for_every_sample(form):
    """eps* = anchor eps_base + alpha sigma K (x - R): a line at one time, of the score form and of the noise form."""
    base, anchor, alpha, at = (0.4, 0.1), 0.5, 0.3, 0.5
    config = Config(q="noised", form=form, alpha=alpha, anchor=anchor, times=MIDDLE, **ONE)
    learner = Learner(task(affine(base, Rectified(), DDIM(1.0), "eps")), config)
    step = alpha * K * (at if form == "score" else 1)
    best = torch.tensor([anchor * base[0] + step, anchor * base[1] - step * R], dtype=torch.float64)
    theta = learner.trained.denoiser.net.theta
    for shift, low, high in ((0.0, 0.0, 1e-5), (0.01, 1e-3, 1.0)):
        theta.grad = None
        with torch.no_grad():
            theta.copy_(best + shift)
        learner.accumulate(batch(points()), torch.ones(60, dtype=torch.float64), torch.arange(60), (0,))
        assert low <= theta.grad.abs().max() < high


def test_the_weight_of_the_score_is_the_score_error():
    l = level(Cosine(), torch.tensor([0.1, 0.7], dtype=torch.float64), torch.zeros(2, 1))
    weight = spec.parse("Score()", WEIGHTS, "weight")
    torch.testing.assert_close(weight("eps", l), 1 / l.sigma.square())
    torch.testing.assert_close(weight("score", l), torch.ones_like(l.sigma))


def test_scales_by_hand():
    first, group = torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])
    later = torch.tensor([0.0, 2.0, 4.0, 4.0])
    std = first.std(correction=0).item()
    expected = {
        "none": (torch.full((4,), 7.0), torch.ones(4)),
        "base": (torch.full((4,), 7.0), torch.full((4,), 1 / std)),
        "batch": (torch.full((4,), 2.5), torch.full((4,), 1 / later.std(correction=0).item())),
        "group": (torch.tensor([1.0, 1.0, 4.0, 4.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])),
    }
    for scale, wanted in expected.items():
        learner = Learner(task(mlp(), shape=(1, 3, 2), conditions=torch.arange(4)), Config(scale=scale))
        equal = learner._moments(torch.ones(4), group)[1]
        assert equal.tolist() == [float(scale == "none")] * 4, "equal rewards have no unit yet"
        learner._moments(first, group)
        for found, said in zip(learner._moments(later, group), wanted):
            torch.testing.assert_close(found, said)


def test_the_kl_is_that_of_the_two_reverse_sdes():
    """Of two affine eps networks, by quadrature over time of E over x_t ~ N(alpha m, alpha^2 + sigma^2)."""
    ours, base = (affine(theta, Cosine(), DDIM(1.0), "eps") for theta in ((0.5, 0.2), (0.3, -0.1)))
    x0 = 0.4 + torch.randn(200_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.linspace(*SPAN, 4001, dtype=torch.float64)
    l = Cosine()(t)
    apart = (0.2 * 0.4 * l.alpha + 0.3).square() + 0.04 * (l.alpha.square() + l.sigma.square())
    wanted = torch.trapezoid((l.d_sigma / l.sigma - l.d_alpha / l.alpha) * apart, t).item()
    assert divergence(ours, base, x0, None, (0,)).mean().item() == pytest.approx(wanted, rel=0.02)
    assert divergence(base, base, x0[:50], None, (0,)).abs().max() == 0


# What is sampled


def law(policy: Policy, times: Tensor, start: tuple[float, float]) -> tuple[float, float]:
    """Mean and variance after all steps of a chain whose every step is affine in x, exactly."""
    mean, var = start
    for t, s in pairwise(times):
        with torch.no_grad():
            step = policy(Observation(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t, s))
        shift, slope = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
        mean, var = slope * mean + shift, slope**2 * var + step.std.item() ** 2
    return mean, var


def ddpm_law(net: nn.Module, steps: int = 1500) -> tuple[float, float]:
    """The law of fine ancestral sampling with a network of the score."""
    policy = Policy(Denoiser(net, VP(), "score"), DDIM(1.0))
    return law(policy, torch.linspace(1, 1e-4, steps + 1, dtype=torch.float64), (0.0, 1.0))


def langevin_law(net: nn.Module, step: float = 0.2) -> tuple[float, float]:
    """The law of annealed Langevin dynamics with a network of the score, and its own bias at the last level."""
    schedule = Geometric(sigma_min=0.1, sigma_max=1.0)
    policy = Policy(Denoiser(net, schedule, "score"), Langevin(step))
    mean, var = law(policy, TimeGrid(4, repeats=300).times(schedule), (0.0, 1.0))
    bias = 1 - step * schedule.sigma_min**2 * K / 4
    return mean, var * bias


@pytest.mark.parametrize("trained", [False, True])
def test_langevin_samples_exp_alpha_r_and_ddpm_does_not(trained):
    """Erratum 76: at s = -K (x - R), plugged in or trained, DDPM gives N(K R / (K - 1/2), 1 / (2 K - 1))."""
    net = matched() if trained else Affine((-K, K * R))
    mean, var = langevin_law(net)
    assert (mean, var) == (pytest.approx(R, abs=2e-3), pytest.approx(1 / K, rel=2e-3))
    mean, var = ddpm_law(net)
    assert (mean, var) == (pytest.approx(K * R / (K - 0.5), abs=2e-3), pytest.approx(1 / (2 * K - 1), rel=3e-2))
    assert abs(mean - R) > 0.09
    assert abs(var - 1 / K) > 0.1


def matched() -> nn.Module:
    """The paper's QSM, trained from another network: score form, R on the noised sample, no anchor."""
    policy = affine((-1.0, 0.0), VP(), DDIM(1.0), "score")
    config = Config(q="noised", anchor=0.0, alpha=1.0, scale="none", weight="SNR()", lr=0.1, updates_per_epoch=1)
    learner = Learner(task(policy), replace(config, noisings=1, ema_decay=0.0))
    for i in range(400):
        learner.optimization.optimizer.lr = 0.1 if i < 200 else 0.01
        learner.update(batch(points(64, seed=i)))
    assert policy.denoiser.net.theta.detach().tolist() == [pytest.approx(-K, abs=2e-3), pytest.approx(K * R, abs=2e-3)]
    return policy.denoiser.net


def test_below_half_the_curvature_ddpm_ends_nowhere():
    """dv / dT = 1 - (2 k - 1) v in T = -log alpha_bar: for k = 0.3 it grows as exp(0.4 T)."""
    total = -2 * VP()(torch.ones((), dtype=torch.float64)).alpha.log().item()
    wanted = 3.5 * math.exp(0.4 * total) - 2.5
    assert ddpm_law(Affine((-0.3, 0.0)))[1] == pytest.approx(wanted, rel=0.05)
    assert wanted > 100


class Gaussian(Exact):
    """The exact denoiser of N(0.2, 0.5) on a line, its score moved by ``more(x, a, b)``; x (B, 1)."""

    m, lam = 0.2, 0.5

    def __init__(self, more=None) -> None:
        super().__init__(VP(), "score", (1.0,), ((self.m,),), (self.lam,))
        self.more = more

    def answer(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        l = level(self.schedule, t, x)
        return super().answer(x, t, cond) + (self.more(x, l.alpha, l.sigma) if self.more else 0)


def posterior(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of x0 given x_t, and the mean's slope in x_t."""
    m, lam = Gaussian.m, Gaussian.lam
    spread = a**2 * lam + b**2
    return m + a * lam / spread * (x - a * m), lam * b**2 / spread, a * lam / spread


def test_with_the_anchor_the_soft_value_leads_to_the_tilted_density_and_the_reward_on_x0_hat_near_it():
    """p exp(alpha R): a linear R moves N(m, lam) by alpha lam, and x0_hat is as good as the soft value; a bowl is
    N((m / lam + alpha K R) / prec, 1 / prec), prec = 1 / lam + alpha K, and x0_hat steers 1 + alpha K v too much."""
    alpha, m, lam = 0.5, Gaussian.m, Gaussian.lam
    x, t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    l = level(VP(), t, x)
    mean, v, slope = posterior(x, l.alpha, l.sigma)
    soft = -K * (mean - R) * slope / (1 + alpha * K * v)
    for reward, exact, gap in ((line, slope.expand_as(x), 1.0), (bowl, soft, 1 + alpha * K * v)):
        q = qvalue.Denoised(task(Policy(Gaussian(), DDIM(1.0)), reward), Gaussian())
        torch.testing.assert_close(qvalue.gradient(q, x, t, None)[1], exact * gap)

    def sampled(more) -> tuple[float, float]:
        return law(Policy(Gaussian(more), DDIM(1.0)), torch.linspace(1, 1e-3, 801, dtype=torch.float64), (0.0, 1.0))

    mean, var = sampled(lambda x, a, b: alpha * posterior(x, a, b)[2])
    assert (mean, var) == (pytest.approx(m + alpha * lam, abs=1e-2), pytest.approx(lam, rel=2e-2))
    precision = 1 / lam + alpha * K
    wanted = ((m / lam + alpha * K * R) / precision, 1 / precision)

    def steered(over: float):
        def more(x, a, b):
            mean, v, slope = posterior(x, a, b)
            return -alpha * K * (mean - R) * slope * ((1 + alpha * K * v) ** over) / (1 + alpha * K * v)

        return more

    assert sampled(steered(0.0)) == (pytest.approx(wanted[0], abs=1e-2), pytest.approx(wanted[1], rel=2e-2))
    mean, var = sampled(steered(1.0))
    assert var < 0.9 * wanted[1], "beyond it"
    assert mean > wanted[0] + 0.01


def right(x: Tensor, cond: object = None) -> Tensor:
    return x.flatten(1)[:, 0]


def test_a_soft_critic_of_the_bases_samples_leads_a_mixture_to_its_tilted_density():
    """Two modes, 1.2 apart: exp(alpha R) makes their shares 1 : exp(1.2 alpha), and moves each by alpha STD^2."""
    alpha, place_ = 1.0, replace(plane_task(), reward=right)
    config = Config(
        value="soft", acts="base", scale="none", alpha=alpha, weight="SNRPlusOne()", noisings=2, memory=20_000
    )
    config = replace(config, critic="ResidualMLP(width=32, depth=2)", critic_updates=30, critic_lr=4e-3, lr=4e-3)
    learner = config.learner(place_, plane_data(), 1)
    for i in range(12):
        learner.optimization.optimizer.lr = learner.critic.optimization.optimizer.lr = 4e-3 * (1 - i / 12)
        item = plan(1, i, 1, 512, 512, 1, i)[0]
        found = learner.update(
            run_item(replace(place_, policy=learner.policy, rollout_spec=config.rollout_spec(8)), item)
        )
    assert 0.3 < found["explained_variance"] < 0.9
    before, after = ((ends(t, 4000)[:, 0] > 0).double().mean().item() for t in (plane_task(), place_))
    assert before == pytest.approx(0.5, abs=0.06)
    odds = before / (1 - before) * math.exp(1.2 * alpha)
    assert after == pytest.approx(odds / (1 + odds), abs=0.06)


# The critic


def test_losses_of_a_value_by_hand():
    q, reward = torch.tensor([1.0]), torch.tensor([3.0])
    assert Mean()(q, reward).item() == 4
    assert Soft(0.5)(q, reward).item() == pytest.approx(2 * (math.e - 1 - 1) / 0.25)
    assert Soft(1e-3)(q, reward).item() == pytest.approx(4, rel=1e-2)


def test_explained_variance_by_hand():
    reward = torch.tensor([0.0, 2.0])
    assert explained_variance(torch.tensor([5.0, 5.0]), reward) == 0
    assert explained_variance(torch.tensor([1.0, 3.0]), reward) == 1
    assert explained_variance(torch.tensor([0.5, 1.5]), reward) == pytest.approx(0.75)
    assert explained_variance(reward, torch.ones(2)) == 0


@pytest.mark.parametrize("value", [Mean(), Soft(1.5)])
def test_a_critic_learns_the_value_of_noised_samples(value):
    """x0 ~ N(0.2, 0.5), R = x0: E[R | x_t] is the posterior mean m, the soft value m + beta v / 2."""
    torch.manual_seed(0)
    critic = Critic(Denoiser(ResidualMLP((1,), classes=1, width=32, depth=2, frequency=10.0), VP(), "eps"), (1,))
    times = spec.parse("Uniform(margin=0.02)", TIMES, "times")
    regression = Regression(Optimization(critic, 5e-3), value, times, updates=90, batch=512, memory=20_000, seed=0)
    x0 = Gaussian.m + Gaussian.lam**0.5 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(20_000, dtype=torch.int64)
    for i in range(4):
        regression.optimization.optimizer.lr = 5e-3 * (1 - i / 4)
        seen = regression.fit(batch(x0, x0[:, 0], none), i)
    x = torch.linspace(-1, 1.4, 13, dtype=torch.float64)[:, None].repeat(5, 1)
    t = torch.tensor([0.05, 0.15, 0.3, 0.5, 0.9], dtype=torch.float64).repeat_interleave(13)
    l = level(VP(), t, x)
    mean, v, _ = posterior(x, l.alpha, l.sigma)
    wanted = mean + (value.beta * v / 2 if isinstance(value, Soft) else 0)
    with torch.no_grad():
        found = critic(x.float(), t, none[: len(x)])
    assert (found - wanted[:, 0]).square().mean().sqrt() < 0.08
    assert (wanted[:, 0] - mean[:, 0]).abs().max() > 0.3 or isinstance(value, Mean)
    told = 1 - posterior(x, *(c[:, None] for c in VP()(torch.linspace(0.02, 0.98, 65).double())[:2]))[1] / Gaussian.lam
    assert seen["explained_variance"] == pytest.approx(told.mean().item(), abs=0.05)


def test_a_copy_of_the_network_is_its_own_and_starts_where_it_is():
    policy = mlp()
    place_ = task(policy, shape=(1, 3, 2), conditions=torch.arange(4))
    critic = make_critic("Copy()", place_, 0)
    state = policy.denoiser.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in critic.denoiser.net.state_dict().items())
    with torch.no_grad():
        critic.denoiser.net.enter.weight.zero_()
    assert policy.denoiser.net.enter.weight.any()
    again = [make_critic("ResidualMLP(width=16)", place_, seed) for seed in (3, 3, 4)]
    assert same(again[0], again[1])
    assert not same(again[0], again[2])


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


# Learning


def net_policy(kind: str, schedule, kernel: Kernel) -> Policy:
    policy = mlp()
    return Policy(Denoiser(policy.denoiser.net, schedule, kind), kernel)


POLICIES = {
    "eps": ("eps", VP(), DDIM(1.0), 6),
    "x0": ("x0", Cosine(), DDIM(0.0), 6),
    "v": ("v", Cosine(), DDIM(1.0), 6),
    "flow": ("flow", Rectified(), DDIM(0.5), 6),
    "trigflow": ("TrigFlow()", Trig(), DDIM(1.0), 6),
    "few-step consistency": ("CM(t_min=0.02)", Karras(sigma_min=0.02, sigma_max=10.0), Renoise(floor=0.02), 2),
}


@pytest.mark.parametrize("q", ["denoised", "noised", "learned"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_learns_by_every_q(policy, q):
    kind, schedule, kernel, steps = POLICIES[policy]
    place_ = task(net_policy(kind, schedule, kernel), lambda x, c: x.mean((1, 2, 3)), (1, 3, 2), steps, torch.arange(4))
    config = Config(q=q, form="noise", alpha=0.5, weight="TruncatedSNR()", lr=3e-3, noisings=2, critic_updates=20)
    learner = config.learner(place_, plane_data(), 0)
    place_ = replace(place_, rollout_spec=config.rollout_spec(steps))
    rewards = [learner.update(run_item(place_, plan(0, i, 4, 24, 96, 4, i)[0]))["reward"] for i in range(6)]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1


def walked(policy: Policy, q: str, n: int = 48, seed: int = 0) -> Trajectory:
    """What workers keep of walks for this agent."""
    whole = class_walks(policy, n=n, seed=seed)
    return batch(whole.x[:, -1], whole.reward if q == "learned" else None, whole.cond)


def made(config: Config, policy: Policy, seed: int = 5) -> Learner:
    return Learner(task(policy, lambda x, c: x.mean((1, 2, 3)), (1, 3, 2), 4, torch.arange(4)), config, seed)


@pytest.mark.parametrize("settings", [{"q": "learned", "memory": 100}, {"q": "denoised", "through": "trained"}])
def test_a_saved_learner_continues_bit_for_bit(settings):
    config = Config(**settings, micro_batch=11, critic_updates=3, critic_batch=8)
    batches = [walked(mlp(), config.q, seed=i) for i in range(5)]
    straight, resumed = made(config, mlp()), made(config, mlp(seed=9))
    for given in batches[:3]:
        straight.update(given)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for given in batches[3:]:
        assert straight.update(given) == resumed.update(given)
    assert same(straight.trained, resumed.trained)
    assert straight.queries == resumed.queries == 5 * 48 * (1 if config.q == "learned" else 1 + config.noisings)


def test_micro_batches_do_not_change_the_gradient():
    gradients = []
    for size in (10**6, 14):
        policy = mlp().double()
        learner = made(Config(q="denoised", **ONE | {"micro_batch": size}), policy)
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(1.1)
        learner.optimization = Capture(policy)
        learner.optimization.optimizer = nn.Module()
        learner.update(walked(mlp().double(), "denoised"))
        gradients += learner.optimization.gradients
    torch.testing.assert_close(*gradients)


def test_the_base_acts_if_told_to_and_does_not_change():
    policy = mlp()
    learner = made(Config(acts="base", lr=1e-2, critic_updates=5), policy)
    learner.update(walked(mlp(), "learned"))
    assert same(learner.policy, mlp())
    assert learner.trained is policy
    assert not same(policy, mlp())


def test_equal_rewards_leave_the_anchored_policy_where_it_is():
    """No unit, no direction: the target is the base, and the gradient there 0."""
    learner = made(Config(weight_decay=0.0, critic_updates=2), mlp())
    given = walked(mlp(), "learned")
    with torch.no_grad():
        for p in learner.critic.critic.head.parameters():
            p.zero_()
    found = learner.update(replace(given, reward=torch.ones(48)))
    assert (found["loss"], found["kl"], found["q_gradient"], found["explained_variance"]) == (0, 0, 0, 0)


def test_bad_rewards_are_refused_before_anything_changes():
    policy = mlp()
    given = walked(policy, "learned")
    given.reward[2] = torch.inf
    with pytest.raises(NumericalError, match=r"\[2\]"):
        made(Config(), policy).update(given)
    assert same(policy, mlp())


def test_preflight_tells_the_gradient_of_a_reward_and_refuses_none_at_all():
    given = walked(mlp(), "noised")
    found = made(Config(q="noised"), mlp()).preflight(given)
    assert found["q_gradient"] == pytest.approx(1 / 6, rel=1e-5)
    assert made(Config(), mlp()).preflight(given) == {}
    learner = made(Config(q="noised"), mlp())
    learner.q = qvalue.Noised(replace(learner.task, reward=lambda x, c: (0 * x).sum((1, 2, 3))))
    with pytest.raises(ConfigError, match="gradient is 0 at every one of 48"):
        learner.preflight(given)


REFUSED = {
    "noised": (("--reward", "jpeg_compressibility"), "'jpeg_compressibility' has no gradient"),
    "denoised": (
        ("--reward", '{"ink": 1.0, "symmetry": 1.0}', "--reward_normalize", "batch"),
        "scores as it learns",
    ),
}


@pytest.mark.parametrize("q", REFUSED)
def test_a_q_that_the_reward_cannot_be_is_refused_before_any_work(q, tmp_path):
    words, said = REFUSED[q]
    result = rlfusion(tmp_path, "finetune", *TINY, "--agent", "qsm", "--agent.q", q, *words)
    assert result.code == 2
    assert said in " ".join(result.err.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(alpha=0.0), "alpha = 0.0"),
        (lambda: Config(anchor=-1.0), "anchor = -1.0"),
        (lambda: Config(times="Unifrm()"), "did you mean 'Uniform'"),
        (lambda: Config(weight="Scor()"), "did you mean 'Score'"),
        (lambda: Config(value="soft", q="denoised"), "value = soft: q, form = denoised, score"),
        (lambda: Config(value="soft", form="noise"), "value = soft"),
        (lambda: Config(through="trained"), "through = trained: q = learned"),
        (lambda: Config(scale="group").check(Plan(10, 1, 0, 20)), "samples_per_prompt = 1"),
        (lambda: Config().check(Plan(1, 3, 0, 20)), "updates_per_epoch = 4"),
        (lambda: made(Config(critic="ResidualMPL()"), mlp()), "did you mean 'ResidualMLP'"),
        (lambda: made(Config(critic="Copy(width=3)"), mlp()), "unknown network 'Copy'"),
        (lambda: made(Config(critic="ResidualMLP(classes=3)"), mlp()), "shape and classes come from the data"),
        (lambda: Learner(task(mlp(), shape=(1, 3, 2)), Config(critic="ResidualMLP()")), "are no classes"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


RUNS = {
    "learned": ("--agent.critic_updates", 5, "--rollout.lag", 1, "--agent.memory", 60),
    "denoised": ("--agent.q", "denoised", "--agent.noisings", 2),
}


@pytest.mark.parametrize("q", RUNS)
def test_stopped_and_resumed_a_run_ends_with_the_same_bits(q, tiny_root, tmp_path):
    settings = (*TINY, "--agent", "qsm", *RUNS[q], "--reward", "meddling:brightness")
    whole, stopped = (
        place(tmp_path / name, tiny_root / "cache", "finetune", *settings) for name in ("whole", "stopped")
    )
    said = whole.start().wait()
    assert said.code == 0, said.err
    summary = json.loads((whole.folder / "summary.json").read_text())
    assert summary["queries"] == 6 * 24 * (1 if q == "learned" else 1 + 2)
    call = {"learned": 15, "denoised": 25}[q]
    assert stopped.signalled_in_call(stopped.start, call, "SIGTERM").code == 75
    assert 0 < int(stopped.checkpoints()[-1].removeprefix("step-")) < 6
    assert stopped.resume().wait().code == 0
    assert_same(stopped, outcome(whole.folder))


def test_adapters_are_trained_and_the_critic_has_none():
    pytest.importorskip("peft")
    policy = mlp()
    lora.attach(policy.denoiser.net, "LoRA(rank=2)")
    learner = made(Config(critic_updates=3), policy)
    before = copy.deepcopy(learner.trained.state_dict())
    learner.update(walked(mlp(), "learned"))
    moved = {name for name, value in learner.trained.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(ADAPTER in name for name in moved)
    assert all(ADAPTER in name for name in learner.state_dict()["base"])
    assert not any(ADAPTER in name for name in learner.critic.critic.state_dict())
