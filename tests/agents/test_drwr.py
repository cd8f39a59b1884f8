"""DRWR: weights by hand, gradients against closed forms, what is held, learning over kinds, resuming."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import Capture, affine, all_transitions, class_walks, collect, mlp
from plane import plane_data
from processes import rlfusion
from quadratic import CHAINS, STEPS, THETA, assert_equal_in_expectation, reward, task_of
from tiny_runs import TINY
from weighted import BETA, FAMILIES, ONE, RAW, ends_of, family, learned_by, plain_task, same, soft

from rlfusion.agents.drwr import Config, Learner
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.denoiser import Guided, answer
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.parameterization import target
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import DDPM, Cosine, Rectified, Trig, level
from rlfusion.objectives.renoise import renoise
from rlfusion.objectives.times import TIMES
from rlfusion.rl.advantage import exponential_weights
from rlfusion.rl.agent import Plan
from rlfusion.rl.replay import Replay
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import checkpoint


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scored(n: int = 400, seed: int = 0, mean: float = 0.3, std: float = 0.5) -> Trajectory:
    """Samples (n, 2) of N(mean, std^2) in four groups, rewarded by their first feature."""
    x = mean + std * torch.randn(n, 1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = tensor(1.0, 0.0)
    return Trajectory(x, times, None, x[:, 0, 0].clone(), torch.arange(n) % 4, None, 0, torch.ones(n, dtype=int))


def learner_of(policy: Policy, **settings) -> Learner:
    return Config(**settings).learner(plain_task(policy), None, 3)


def small(seed: int = 0, **settings) -> Learner:
    """A learner of a network of 3x2 latents and four classes, with data."""
    points = plane_data(40)
    data = replace(points, x=points.x.repeat(1, 1, 3, 1))
    return Config(**settings).learner(plain_task(mlp(seed), (1, 3, 2), 4), data, 5)


def test_weights_by_hand():
    a = tensor(0.0, math.log(2), math.log(8))
    torch.testing.assert_close(exponential_weights(a, 1.0, None, False), tensor(1, 2, 8))
    torch.testing.assert_close(exponential_weights(a, 2.0, 5.0, False), tensor(1, 4, 5))
    torch.testing.assert_close(exponential_weights(a, 2.0, 5.0, True), tensor(0.3, 1.2, 1.5))


def test_large_rewards_need_no_smaller_beta_but_raw_weights_do():
    a = tensor(900.0, 1000.0, 1000.0)
    torch.testing.assert_close(exponential_weights(a, 1.0, None, True), tensor(0, 1.5, 1.5), atol=1e-30, rtol=1e-9)
    with pytest.raises(NumericalError, match=r"exp\(1000\)"):
        exponential_weights(a, 1.0, None, False)


def test_a_constant_baseline_cancels_unless_the_clip_is_active():
    a = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for w_max in (None, 50.0):
        torch.testing.assert_close(*(exponential_weights(a + c, 1.5, w_max, True) for c in (0.0, 0.7)))
    clipped = [exponential_weights(a + c, 1.5, 2.0, True) for c in (0.0, 0.7)]
    assert (clipped[0] - clipped[1]).abs().max() > 0.2


@pytest.mark.parametrize("rule", ["none", "batch", "group"])
def test_rewards_are_normalised_over_what_is_said(rule):
    batch = scored()
    learner = learner_of(affine(THETA, Rectified(), DDIM(1.0), "x0"), normalize=rule, on="noised")
    found = learner._advantage(batch)
    parts = {"none": [], "batch": [found], "group": [found[batch.group == g] for g in range(4)]}[rule]
    for part in parts:
        assert (part.mean().item(), part.std(correction=0).item()) == (
            pytest.approx(0, abs=1e-9),
            pytest.approx(1, rel=1e-4),
        )
    assert torch.equal(found, batch.reward) == (rule == "none")


KINDS = {
    "eps": (DDPM(), "eps"),
    "x0": (Cosine(), "x0"),
    "v": (Cosine(), "v"),
    "flow": (Rectified(), "flow"),
    "TrigFlow": (Trig(), "TrigFlow()"),
}


@pytest.mark.parametrize("name", KINDS)
def test_on_noised_samples_the_loss_is_weighted_in_what_the_network_predicts(name):
    """Its finite difference, and that of a hold to the base, in micro-batches."""
    schedule, kind = KINDS[name]
    batch, kl, h = scored(60), 0.3, 1e-6
    policy = affine((0.4, 0.1), schedule, DDIM(1.0), kind)
    learner = learner_of(policy, on="noised", beta=BETA, kl=kl, **RAW, **ONE | {"micro_batch": 17})
    key, weight = (3, "weighted noise", 0, 0), (BETA * batch.reward).exp()
    x0, rows = batch.x[:, 0], torch.arange(60)
    x, t, eps = renoise(x0, schedule, spec.parse("Uniform()", TIMES, "times"), key)
    aim = target(kind, x0, eps, level(schedule, t, x0))
    scale = policy.denoiser.answer(x, t) - 0.1  # 0.4 c_in x
    theta = torch.tensor([0.45, 0.05], dtype=torch.float64)

    def loss(at) -> float:
        y = at[0] / 0.4 * scale + at[1]
        base = scale + 0.1
        return (weight * (y - aim).square().mean(1) + kl * (y - base).square().mean(1)).mean().item()

    with torch.no_grad():
        policy.denoiser.net.theta.copy_(theta)
    records = learner.regression.form.accumulate(batch, rows, lambda places: weight[places.walk], *key)
    assert len(records) == 4
    difference = [(loss(theta + h * e) - loss(theta - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)]
    torch.testing.assert_close(policy.denoiser.net.theta.grad.tolist(), difference, rtol=1e-5, atol=1e-8)


def test_the_expected_gradient_on_noised_samples_is_that_of_the_tilted_density():
    """R = x_1 on N(m, s^2) tilts to N(m + beta s^2, s^2) times Z in one dimension; at t = 1/2 of the straight path,
    x = (x_0 + eps) / 2, and y = theta_0 x + theta_1 of eps."""
    m, s, theta = 0.3, 0.5, np.array([0.2, -0.1])
    policy = affine(tuple(theta), Rectified(), DDIM(1.0), "eps")
    learner = learner_of(policy, on="noised", beta=BETA, times="Uniform(margin=0.4999)", **RAW, **ONE)
    capture = learner.regression.optimization = Capture(policy)
    for i in range(40):
        learner.update(scored(4000, i, m, s))
    total, z = np.zeros(2), math.exp(BETA * m + BETA**2 * s**2 / 2)
    for mean in (m + BETA * s**2, m):
        x, xx, x_eps = mean / 2, ((mean**2 + s**2) + 1) / 4, 0.5
        total += z * np.array([theta[0] * xx + theta[1] * x - x_eps, theta[0] * x + theta[1]])
    found = torch.stack(capture.gradients).numpy()
    assert_equal_in_expectation((found.mean(0), found.std(0, ddof=1) / math.sqrt(len(found))), total)


@pytest.mark.parametrize("name", CHAINS)
def test_the_expected_gradient_on_the_chain_is_that_of_the_soft_value(name):
    """At the acting weights E[w grad log p] = grad E[exp(beta R)] through the noisy steps."""
    chain, made = CHAINS[name]()
    policy, h = affine(THETA, **made), 1e-5
    learner = Config(on="chain", beta=BETA, **RAW, **ONE).learner(task_of(policy), None, 0)
    capture = learner.regression.optimization = Capture(policy)
    times, g = TimeGrid(STEPS).times(made["schedule"]), torch.Generator().manual_seed(0)
    for _ in range(40):
        learner.update(collect(policy, times, torch.randn(4000, STEPS + 1, 2, generator=g).double(), reward))
    found = -torch.stack(capture.gradients).numpy()
    truth = []
    for direction in np.eye(2):
        ends = [np.where(chain.noisy[:, None], THETA + sign * h * direction, THETA) for sign in (1, -1)]
        truth.append((soft(chain, ends[0]) - soft(chain, ends[1])) / (2 * h))
    error = found.std(0, ddof=1) / math.sqrt(len(found))
    assert_equal_in_expectation((found.mean(0), error), np.array(truth))


def gradients_of(on: str, batches: int = 30, n: int = 4000) -> torch.Tensor:
    """Gradients at other weights than acted, (batches, 2), of walks with weights exp(R / 4) of mean one."""
    made, found = CHAINS["ddim"]()[1], []
    policy, actor, g = affine(THETA, **made), affine(THETA, **made), torch.Generator().manual_seed(0)
    learner = Config(on=on, **RAW, **ONE).learner(task_of(policy), None, 0)
    theta = policy.denoiser.net.theta
    for _ in range(batches):
        noise = torch.randn(n, STEPS + 1, 2, generator=g).double()
        batch = collect(actor, TimeGrid(STEPS).times(made["schedule"]), noise, reward)
        weight = (batch.reward / 4).softmax(0) * n
        with torch.no_grad():
            theta.copy_(tensor(*THETA))
            learner.regression.form.begin(batch)
            theta.copy_(tensor(-0.25, 0.3))
        learner.regression.form.accumulate(batch, torch.arange(n), lambda places, w=weight: w[places.walk])
        found.append(theta.grad.clone())
        theta.grad = None
    return torch.stack(found)


def test_centred_is_the_same_expected_gradient_anywhere_with_less_noise():
    plain, centred = gradients_of("chain"), gradients_of("centred")
    gap = plain - centred
    assert (gap.mean(0).abs() < 4 * gap.std(0) / len(gap) ** 0.5).all()
    assert gap.std(0).norm() / len(gap) ** 0.5 < 0.05 * centred.mean(0).norm(), "no power"
    assert (centred.std(0) < 0.5 * plain.std(0)).all()


def test_on_the_chain_each_walk_has_its_own_weight_in_micro_batches():
    policy = mlp().double()
    batch, gradients = class_walks(mlp().double()), []
    learner = Config(on="chain", kl=0.2, **ONE | {"micro_batch": 7}).learner(plain_task(policy, (1, 3, 2), 4), None, 5)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)
    weight, rows = torch.rand(len(batch), dtype=torch.float64), torch.tensor([3, 11, 4])
    learner.regression.form.accumulate(batch, rows, lambda places: weight[places.walk])
    gradients.append([p.grad.clone() for p in policy.parameters()])
    policy.zero_grad()
    walk, step = all_transitions(batch.take(rows))
    obs, action = batch.take(rows).transitions(walk, step)
    found = policy(obs)
    kl = found.kl(learner.regression.form.base(obs))
    ((0.2 * kl - weight[rows][walk] * found.log_prob(action)).sum() / 3).backward()
    torch.testing.assert_close(gradients[0], [p.grad for p in policy.parameters()])


def test_under_guidance_the_guided_answer_is_regressed():
    inner = mlp().denoiser
    guided = Guided(inner, 1.5, torch.tensor([4]), rescale=0.3)
    x, t, cond = torch.randn(5, 1, 3, 2), torch.linspace(0.2, 0.9, 5).double(), torch.arange(5) % 4
    p = guided(x, t, cond)
    torch.testing.assert_close(answer(guided, x, t, cond), target("v", p.x0, p.eps, level(Cosine(), t, x)))
    learner = Config(on="noised").learner(plain_task(Policy(guided, DDIM(1.0)), (1, 3, 2), 4), None, 0)
    before = copy.deepcopy(inner.state_dict())
    learner.update(ends_of(class_walks(learner.policy)))
    assert any(not torch.equal(value, before[name]) for name, value in inner.state_dict().items())


def test_the_newest_walks_are_held():
    memory = Replay(5)
    assert memory.state_dict() == {}
    sizes = []
    for seed, n in enumerate((3, 4, 2, 8)):
        batch = scored(n, seed)
        held = memory.add(batch)
        sizes.append(len(held))
        assert torch.equal(held.x[-n:], batch.x)
        assert torch.equal(held.reward[-n:], batch.reward)
    assert sizes == [3, 5, 5, 8], "never fewer than the last rollout's"
    memory = Replay(0)
    assert len(memory.add(scored(4))) == 4
    assert len(memory) == 0


@pytest.mark.parametrize("on", ["noised", "chain"])
def test_weights_are_of_all_that_is_held(on):
    learner = small(on=on, memory=100, normalize="batch", w_max=None)
    first, second = class_walks(mlp(), seed=1), class_walks(mlp(), seed=2)
    second.reward.add_(1.0)
    for n, batch in enumerate((first, second), 1):
        found = learner.update(batch if on == "chain" else ends_of(batch))
        assert found["held"] == 24 * n
    reward = torch.cat([first.reward, second.reward])
    weight = learner.config.weights((reward - reward.mean()) / reward.std(correction=0))
    assert weight.mean().item() == pytest.approx(1, rel=1e-5)
    assert weight[24:].mean() > 2 * weight[:24].mean()
    assert found["weight_ess"] == pytest.approx(1 / weight.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(("on", "memory"), [("noised", 0), ("noised", 60), ("chain", 60), ("centred", 0)])
def test_a_saved_learner_continues_bit_for_bit(on, memory, tmp_path):
    settings = {"on": on, "memory": memory, "kl": 0.1, "pretrain_weight": 0.2, "pretrain_batch": 8, "micro_batch": 31}
    batches = [class_walks(mlp(), seed=i) for i in range(4)]
    batches = batches if on != "noised" else [ends_of(b) for b in batches]
    straight, resumed = small(**settings), small(seed=9, **settings)
    for batch in batches[:2]:
        straight.update(batch)
    checkpoint.save(tmp_path, 2, {"learner": straight.state_dict()})
    resumed.load_state_dict(checkpoint.load(tmp_path / "step-00000002")["learner"])
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    assert same(straight.policy, resumed.policy)
    assert straight.queries == resumed.queries == 4 * 24
    assert len(straight.memory) == memory


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"ode"}))
def test_it_learns_with_every_kind_of_policy(name):
    first, last, std = learned_by(Config(lr=3e-3, ema_decay=0.0), name)
    assert last > first + std


def test_it_learns_on_noised_samples_of_a_chain_without_noise():
    first, last, std = learned_by(Config(on="noised", lr=3e-3, ema_decay=0.0), "ode")
    assert last > first + std
    with pytest.raises(ConfigError, match="no noise at any"):
        Config(on="chain").learner(family("ode"), None, 0)


def test_bad_rewards_are_refused_before_anything_is_held():
    learner, batch = small(on="chain", memory=50), class_walks(mlp())
    batch.reward[2] = torch.inf
    with pytest.raises(NumericalError, match=r"\[2\]"):
        learner.update(batch)
    assert len(learner.memory) == 0


def test_the_preflight_says_how_few_samples_count_and_refuses_other_weights():
    learner, batch = small(on="chain", beta=5.0, memory=50), class_walks(mlp())
    before = copy.deepcopy(learner.state_dict())
    found = learner.preflight(batch)
    assert 0 < found["weight_ess"] < 0.5
    assert found["log_ratio_max"] < 1e-3
    assert str(learner.state_dict()) == str(before)
    with pytest.raises(NumericalError, match="ratio is not 1"):
        learner.preflight(class_walks(mlp(seed=4)))
    assert set(small(on="noised").preflight(ends_of(batch))) == {"weight_ess", "clipped"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(beta=0), "beta = 0"),
        (lambda: Config(w_max=-1), "w_max = -1"),
        (lambda: Config(times="Unifrm()"), "did you mean 'Uniform'"),
        (lambda: Config(time_weight="Onw()"), "did you mean 'Own'"),
        (lambda: Config(memory=-1), "memory = -1"),
        (lambda: Config(memory=300), "memory = 300: .*centred"),
        (lambda: Config().check(Plan(10, 24, 1, 20)), "lag = 1: on 'centred'"),
        (lambda: Config(label_dropout=1.5), "label_dropout = 1.5"),
        (lambda: Config(on="chain", memory=200).check(Plan(10, 24, 0, 20)), "memory = 200: expected 0, or at least"),
        (lambda: Config().check(Plan(10, 1, 0, 20)), "samples_per_prompt = 1"),
        (lambda: Config(updates_per_epoch=4).check(Plan(1, 3, 0, 20)), "updates_per_epoch = 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_command(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    words = ("finetune", "--agent", "drwr", *TINY, "--reward", "ink", "--agent.on", "noised", "--agent.memory", 60)
    said = rlfusion(tmp_path, *words, "--name", "it", "--chain.kernel", "DDIM(eta=0.0)")
    assert said.code == 0, said.err
