"""DiffusionNFT and online Diffusion-DPO: closed forms, finite differences, arithmetic by hand, learning, resuming."""

import copy
import json
import math

import pytest
import torch
from chains import Capture, affine, class_walks, mlp
from processes import rlfusion
from rounding import ROUNDING
from tiny_runs import TINY
from torch.nn.functional import logsigmoid

from rlfusion.agents import dpo, nft
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.parameterization import target
from rlfusion.diffusion.schedule import DDPM, Rectified, level
from rlfusion.objectives.renoise import renoise
from rlfusion.objectives.times import TIMES
from rlfusion.rl.agent import Plan
from rlfusion.rollout.trajectory import Trajectory

ONE = {"epochs": 1, "updates_per_epoch": 1, "noisings": 1, "micro_batch": 10**6}
MIDDLE = "Uniform(margin=0.4999)"
AGENTS = {"nft": nft, "dpo": dpo}


def scored(n: int = 400, seed: int = 0) -> Trajectory:
    """Samples (n, 2) of N(0.3, 1) in four groups, rewarded by their first feature."""
    x = 0.3 + torch.randn(n, 1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    group = torch.arange(n) % 4
    return Trajectory(x, times, None, x[:, 0, 0].clone(), group, None, 0, torch.ones(n, dtype=torch.int64))


def ends(policy, n: int = 48, seed: int = 0) -> Trajectory:
    """What workers keep of walks for these agents."""
    whole = class_walks(policy, n=n, seed=seed)
    begin = torch.full((n,), 4)
    return Trajectory(whole.x[:, -1:], whole.times, None, whole.reward, whole.group, whole.cond, 0, begin)


def test_noising_is_a_pure_function_of_its_key_and_has_the_law_of_its_time():
    x0, times = torch.full((20_000, 1), 2.0, dtype=torch.float64), spec.parse(MIDDLE, TIMES, "times")
    a, b = (renoise(x0, Rectified(), times, (1, "a")) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.x, renoise(x0, Rectified(), times, (1, "b")).x)
    assert a.x.mean().item() == pytest.approx(0.5 * 2.0, abs=0.02)
    assert a.x.std().item() == pytest.approx(0.5, abs=0.02)


def test_nft_moves_the_denoiser_by_the_regression_of_its_errors():
    """With w = 1 its minimiser is f_old + E[(2 r - 1)(x_0 - f_old) | x_t] / b: here a line, by least squares."""
    batch, beta, old = scored(), 0.7, (0.4, 0.1)
    policy = affine(old, Rectified(), DDIM(1.0), "x0")
    learner = nft.Learner(policy, nft.Config(beta=beta, adaptive=False, times=MIDDLE, **ONE))
    rows, key = torch.arange(len(batch)), (0, "here")
    r = torch.rand(len(batch), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0, x = batch.x[:, 0], renoise(batch.x[:, 0], Rectified(), learner.times, key).x
    f_old = old[0] * x + old[1]
    aim = f_old + (2 * r - 1)[:, None] * (x0 - f_old) / beta
    design = torch.stack([x.flatten(), torch.ones(x.numel(), dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(design, aim.flatten()).solution
    with torch.no_grad():
        policy.denoiser.net.theta.copy_(best)
    learner.accumulate(batch, r, rows, key)
    assert policy.denoiser.net.theta.grad.abs().max() < 1e-10
    with torch.no_grad():
        policy.denoiser.net.theta.copy_(best + 0.01)
    learner.accumulate(batch, r, rows, key)
    assert policy.denoiser.net.theta.grad.abs().max() > 1e-3


def test_nft_by_hand():
    """One sample, f_old = 0, f = 1, x_0 = 3, beta = 1/2, A = 1 of c = 2: r = 3/4, f+ = 1/2, f- = -1/2."""
    policy = affine((0.0, 0.0), Rectified(), DDIM(1.0), "x0")
    batch = scored(1)
    batch.x.fill_(3.0)
    for adaptive, expected in ((False, (0.75 * 6.25 + 0.25 * 12.25) * 4), (True, (0.75 * 2.5 + 0.25 * 3.5) * 4)):
        config = nft.Config(beta=0.5, advantage_clip=2.0, adaptive=adaptive, kl=0.0, times=MIDDLE, **ONE)
        learner = nft.Learner(policy, config)
        with torch.no_grad():
            policy.denoiser.net.theta.copy_(torch.tensor([0.0, 1.0]))
            learner.policy.denoiser.net.theta.zero_()
        (record,) = learner.accumulate(batch, torch.tensor([0.75]), torch.tensor([0]), (0,))
        assert record["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_nft_is_its_finite_difference_with_the_weight_held():
    """Adaptive, with the pull to the base: w of Eq. (3) is that of the present weights and stays as it is."""
    batch, old, base, b, c, kl = scored(30), (0.4, 0.1), (0.3, 0.2), 0.7, 2.0, 0.35
    policy = affine(old, Rectified(), DDIM(1.0), "x0")
    config = nft.Config(beta=b, advantage_clip=c, kl=kl, times="Uniform(margin=0.2)", **ONE | {"micro_batch": 11})
    learner, rows, key = nft.Learner(policy, config), torch.arange(len(batch)), (3,)
    r = torch.rand(len(batch), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0, x = batch.x[:, 0], renoise(batch.x[:, 0], Rectified(), learner.times, key).x
    at = torch.tensor([0.55, -0.05], dtype=torch.float64)

    def signs(theta) -> tuple:
        f, f_old = theta[0] * x + theta[1], old[0] * x + old[1]
        return f, (1 - b) * f_old + b * f - x0, (1 + b) * f_old - b * f - x0

    weights = [e.abs().mean(1) for e in signs(at)[1:]]

    def loss(theta) -> float:
        f, towards, away = signs(theta)
        parts = [e.square().mean(1) / w for e, w in zip((towards, away), weights)]
        pull = (f - base[0] * x - base[1]).square().mean(1)
        return ((r * parts[0] + (1 - r) * parts[1]) * c / b + kl * pull).mean().item()

    with torch.no_grad():
        policy.denoiser.net.theta.copy_(at)
        learner.base.denoiser.net.theta.copy_(torch.tensor(base))
    learner.accumulate(batch, r, rows, key)
    h = 1e-6
    difference = [(loss(at + h * e) - loss(at - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)]
    torch.testing.assert_close(policy.denoiser.net.theta.grad.tolist(), difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("reward", "expected"), [([0.0, 2.0], [0.25, 0.75]), ([5.0, 5.0], [0.5, 0.5])])
def test_the_optimality_of_nft_is_half_plus_half_the_held_advantage(reward, expected):
    """Eq. (1) with c = 2: group-relative advantages of -1 and 1, or 0."""
    seen = []

    class Looked(nft.Learner):
        def accumulate(self, batch, optimality, rows, key):
            seen.append(optimality)
            return super().accumulate(batch, optimality, rows, key)

    batch = ends(mlp(), n=2)
    batch.group.zero_()
    batch.reward.copy_(torch.tensor(reward))
    Looked(mlp(), nft.Config(advantage_clip=2.0, **ONE)).update(batch)
    torch.testing.assert_close(seen[0], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_nft_with_all_good_is_supervised_training():
    batch, policy = scored(), affine((0.4, 0.1), Rectified(), DDIM(1.0), "x0")
    learner = nft.Learner(policy, nft.Config(adaptive=False, advantage_clip=1.0, times=MIDDLE, **ONE))
    learner.accumulate(batch, torch.ones(len(batch)), torch.arange(len(batch)), (0,))
    theta = policy.denoiser.net.theta
    got, theta.grad = theta.grad.clone(), None
    x = renoise(batch.x[:, 0], Rectified(), learner.times, (0,)).x
    (theta[0] * x + theta[1] - batch.x[:, 0]).square().mean().backward()
    torch.testing.assert_close(got, theta.grad, **ROUNDING)


def test_the_acting_policy_of_nft_follows_by_eta():
    policy = mlp()
    learner = nft.Learner(policy, nft.Config(lr=1e-2, eta_rate=0.3, eta_max=0.5))
    for iteration, eta in enumerate((0.0, 0.3, 0.5)):
        before = copy.deepcopy(learner.policy.state_dict())
        assert learner.update(ends(policy, seed=iteration))["eta"] == pytest.approx(eta)
        for name, new in policy.state_dict().items():
            torch.testing.assert_close(learner.policy.state_dict()[name], eta * before[name] + (1 - eta) * new)


def test_pairs_by_hand():
    reward = torch.tensor([1.0, 5.0, 3.0, 2.0, 7.0, 7.0, 7.0, 8.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    winner, loser = dpo.pair(reward, group, 0.5)
    assert [(w, l) for w, l in zip(winner.tolist(), loser.tolist())][:2] == [(1, 0), (2, 3)]
    assert winner.tolist()[2:] == [7]
    assert reward[loser[2]] == 7
    assert [len(part) for part in dpo.pair(torch.ones(8), group, 0.5)] == [0, 0]
    assert dpo.pair(reward, group, 0.25)[0].tolist() == [1, 7]


@pytest.mark.parametrize("error", ["v", "eps", "x0"])
def test_the_gradient_of_dpo_is_its_finite_difference(error):
    batch, schedule = scored(40), DDPM()
    policy = affine((0.4, 0.1), schedule, DDIM(1.0), "eps")
    config = dpo.Config(error=error, beta=0.3, times="Uniform(margin=0.2)", **ONE | {"micro_batch": 12})
    learner = dpo.Learner(policy, config)
    winner, loser = dpo.pair(batch.reward, batch.group, 0.25)
    _, t, eps = renoise(batch.x[winner, 0], schedule, learner.times, (7,))

    def loss(theta, reference=(0.4, 0.1)) -> float:
        gaps = []
        for rows in (winner, loser):
            x0, l = batch.x[rows, 0], level(schedule, t, batch.x[winner, 0])
            x = l.alpha * x0 + l.sigma * eps
            errors = []
            for at in (theta, reference):
                y = at[0] * x + at[1]
                x0_hat = (x - l.sigma * y) / l.alpha
                errors.append((target(error, x0_hat, y, l) - target(error, x0, eps, l)).square().sum(1))
            gaps.append(errors[0] - errors[1])
        return -logsigmoid(-0.3 * (gaps[0] - gaps[1])).mean().item()

    theta, h = torch.tensor([0.45, 0.05], dtype=torch.float64), 1e-6
    with torch.no_grad():
        policy.denoiser.net.theta.copy_(theta)
    records = learner.accumulate(batch, winner, loser, (7,))
    assert len(records) == 2, "10 pairs, 6 in a call"
    difference = [(loss(theta + h * e) - loss(theta - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)]
    torch.testing.assert_close(policy.denoiser.net.theta.grad.tolist(), difference, rtol=1e-5, atol=1e-8)


def test_dpo_at_the_reference_has_no_margin():
    policy = mlp()
    learner = dpo.Learner(policy, dpo.Config(**ONE))
    metrics = learner.update(ends(policy))
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert metrics["margin"] == 0
    assert metrics["pairs"] == 4 * 3


def test_equal_rewards_leave_dpo_as_it_is():
    policy = mlp()
    batch = ends(policy)
    batch.reward.fill_(1.0)
    before = copy.deepcopy(policy.state_dict())
    metrics = dpo.Learner(policy, dpo.Config()).update(batch)
    assert (metrics["pairs"], metrics["grad_norm"]) == (0, 0)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_the_reference_of_dpo_moves_when_told():
    policy = mlp()
    learner = dpo.Learner(policy, dpo.Config(lr=1e-2, reference_every=2))
    learner.update(ends(policy))
    assert not same(learner.reference, policy)
    learner.update(ends(policy, seed=1))
    assert same(learner.reference, policy)


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_learns(agent):
    policy = mlp()
    module = AGENTS[agent]
    learner = module.Learner(policy, module.Config(lr=3e-3, ema_decay=0.0))
    rewards = [learner.update(ends(learner.policy, n=200, seed=i))["reward"] for i in range(15)]
    assert rewards[-1] > rewards[0] + 0.2


@pytest.mark.parametrize("agent", AGENTS)
def test_a_saved_learner_continues_bit_for_bit(agent):
    module = AGENTS[agent]
    settings = {"nft": {"kl": 0.1, "eta_rate": 0.2}, "dpo": {"reference_every": 3}}[agent]
    config = module.Config(micro_batch=11, **settings)
    batches = [ends(mlp(), seed=i) for i in range(4)]
    straight, resumed = module.Learner(mlp(), config, 5), module.Learner(mlp(seed=9), config, 5)
    for batch in batches[:2]:
        straight.update(batch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    assert same(straight.policy, resumed.policy)
    assert straight.queries == resumed.queries == 4 * 48


@pytest.mark.parametrize("agent", AGENTS)
def test_micro_batches_do_not_change_the_gradient(agent):
    module, gradients = AGENTS[agent], []
    for size in (10**6, 14):
        policy = mlp().double()
        learner = module.Learner(policy, module.Config(**ONE | {"micro_batch": size}))
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(1.1)
        learner.optimization = Capture(policy)
        learner.update(ends(mlp().double()))
        gradients += learner.optimization.gradients
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("agent", AGENTS)
def test_bad_rewards_are_refused(agent):
    module, policy = AGENTS[agent], mlp()
    batch = ends(policy)
    batch.reward[2] = torch.inf
    with pytest.raises(NumericalError, match=r"\[2\]"):
        module.Learner(policy, module.Config()).update(batch)


@pytest.mark.parametrize("agent", AGENTS)
def test_a_deterministic_chain_will_do(agent):
    module, policy = AGENTS[agent], mlp(kernel=DDIM(0.0))
    before = [p.detach().clone() for p in policy.parameters()]
    module.Learner(policy, module.Config()).update(ends(policy))
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nft.Config(beta=0), "beta = 0"),
        (lambda: nft.Config(eta_max=1.0), "eta_max = 1.0"),
        (lambda: nft.Config(times="Unifrm()"), "did you mean 'Uniform'"),
        (lambda: dpo.Config(pairs=0.6), "pairs = 0.6"),
        (lambda: dpo.Config().check(Plan(10, 3, 0, 20)), "samples_per_prompt = 3: expected at least 4"),
        (lambda: nft.Config().check(Plan(10, 1, 0, 20)), "samples_per_prompt = 1"),
        (lambda: nft.Config().check(Plan(1, 3, 0, 20)), "updates_per_epoch = 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize("agent", AGENTS)
def test_the_command(agent, tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    words = ("finetune", "--agent", agent, *TINY, "--reward", "ink", "--chain.kernel", "DDIM(eta=0.0)")
    for name, updates in (("whole", 6), ("part", 6)):
        said = rlfusion(tmp_path, *words, "--name", name, "--updates", updates)
        assert said.code == 0, said.err
    summaries = [json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in ("whole", "part")]
    assert summaries[0] == summaries[1]
    assert summaries[0]["queries"] == 6 * 24
