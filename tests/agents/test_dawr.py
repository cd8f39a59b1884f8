"""DAWR: GAE by hand and at its limits, the value function against E[R | x_t], gradients, resuming."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import Capture, affine, class_walks, collect, mlp
from plane import plane_data
from quadratic import STEPS, THETA, assert_equal_in_expectation, ddim_chain, task_of
from quadratic import reward as quadratic
from weighted import ONE, RAW, ends_of, learned_by, plain_task, same, soft

from rlfusion.agents import drwr
from rlfusion.agents.dawr import Config, Learner
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.rl.advantage import chain_advantages
from rlfusion.rl.agent import Plan
from rlfusion.rl.chain_value import ChainValue, Settings
from rlfusion.rl.weighted import Places
from rlfusion.training import checkpoint


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_gae_by_hand():
    """R = 10, V = 1, 2, 4, gamma = .5, lam = .5: d = 0, 0, 6, A = .0625 * 6, .25 * 6, 6; G = A + V."""
    found = chain_advantages(tensor(10.0), tensor([1.0, 2.0, 4.0]), 0.5, 0.5)
    torch.testing.assert_close(found, tensor([0.375, 1.5, 6.0]))
    uneven = chain_advantages(tensor(3.0), tensor([1.0, -1.0, 2.0]), 0.9, 0.5)
    d = (0.9 * -1 - 1, 0.9 * 2 + 1, 3 - 2)
    torch.testing.assert_close(uneven, tensor([d[0] + 0.45 * (d[1] + 0.45 * d[2]), d[1] + 0.45 * d[2], d[2]]))


def test_the_limits_of_lambda():
    g = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(*shape, generator=g).double() for shape in ((5,), (5, 4)))
    whole = chain_advantages(reward, value, 0.9, 1.0)
    torch.testing.assert_close(whole + value, reward[:, None] * 0.9 ** torch.arange(3, -1, -1))
    following = torch.cat([0.9 * value[:, 1:], reward[:, None]], 1)
    torch.testing.assert_close(chain_advantages(reward, value, 0.9, 0.0) + value, following)
    with pytest.raises(ValueError, match="reward"):
        chain_advantages(reward, value[0], 1.0, 1.0)


def linear(x: torch.Tensor) -> torch.Tensor:
    return x.sum(1)


def expectation(chain, x: np.ndarray) -> np.ndarray:
    """E[sum_d x_K | x_k] of states (N, K, d) of the linear-Gaussian chain."""
    out = np.zeros(x.shape[:2])
    for k in range(x.shape[1]):
        slope, shift = 1.0, 0.0
        for p, q in zip(chain.p[k:], chain.q[k:]):
            c = p + q * THETA[0]
            slope, shift = c * slope, c * shift + q * THETA[1]
        out[:, k] = (slope * x[:, k] + shift).sum(1)
    return out


@pytest.mark.parametrize("lam", [1.0, 0.7])
def test_the_value_function_becomes_the_expected_reward(lam):
    """On fresh walks of a linear-Gaussian chain, to .1, where R has a std of 1.3, of which the last state tells 1.1."""
    chain, made = ddim_chain()
    policy, g = affine(THETA, **made), torch.Generator().manual_seed(0)
    task = task_of(policy, linear)
    config = Settings(value_net="ResidualMLP(width=32, depth=1)", lam=lam, value_lr=3e-3, value_batch=2000)
    critic, n = ChainValue(task, config, 0), 2000
    walks = [collect(policy, task.times, torch.randn(n, STEPS + 1, 2, generator=g).double(), linear) for _ in range(26)]
    explained = []
    for i, batch in enumerate(walks[:-1]):
        critic.see(batch.reward)
        value = critic.along(batch)
        explained.append(critic.explained(batch.reward, value))
        critic.fit(batch, critic.advantages(batch.reward, value) + value, i)
    truth = expectation(chain, walks[-1].x[:, :-1].numpy())
    error = critic.along(walks[-1]).numpy() - truth
    assert (error.std(0) < 0.1).all(), error.std(0)
    assert truth.std(0)[-1] > 1.0
    assert np.abs(error.mean(0)).max() < 0.05
    noise = (walks[-1].reward[:, None].numpy() - truth).var() / walks[-1].reward.numpy().var()
    assert abs(explained[0]) < 0.2
    assert explained[-1] == pytest.approx(1 - noise, abs=0.05)


def chain_learner(policy, score=quadratic, **settings) -> Learner:
    return Config(**RAW | ONE | settings).learner(task_of(policy, score), None, 0)


def test_the_expected_gradient_with_a_constant_baseline_is_that_of_the_soft_value():
    """A = R - b has the gradient of E[exp(beta R)] exp(-beta b); here V is b everywhere."""
    chain, made = ddim_chain()
    policy, h = affine(THETA, **made), 1e-5
    learner = chain_learner(policy, on="chain", beta=0.8, advantage="critic", value_epochs=1)
    capture = learner.regression.optimization = Capture(policy)
    learner.critic.value.mean.fill_(-0.4)
    learner.critic.see = learner.critic.fit = lambda *_: {}
    g = torch.Generator().manual_seed(0)
    times = learner.critic.times
    for _ in range(40):
        noise = torch.randn(4000, STEPS + 1, 2, generator=g).double()
        learner.update(collect(policy, times, noise, quadratic))
    found = -torch.stack(capture.gradients).numpy()
    truth = []
    for direction in np.eye(2):
        ends = [np.where(chain.noisy[:, None], THETA + sign * h * direction, THETA) for sign in (1, -1)]
        truth.append((soft(chain, ends[0]) - soft(chain, ends[1])) / (2 * h) * math.exp(0.8 * 0.4))
    error = found.std(0, ddof=1) / math.sqrt(len(found))
    assert_equal_in_expectation((found.mean(0), error), np.array(truth))


def test_along_the_chain_each_step_has_the_weight_of_its_own_advantage():
    policy = mlp().double()
    batch = class_walks(mlp().double())
    learner = Config(**ONE | RAW | {"beta": 1.3, "gamma": 0.9, "lam": 0.6}).learner(
        plain_task(policy, (1, 3, 2), 4), None, 0
    )
    value = torch.randn(len(batch), batch.steps, dtype=torch.float64)
    steps = learner.regression.form.transitions.steps
    weigh = learner._weigh(batch, learner._advantage(batch, value))
    walk, step = torch.tensor([3, 5, 9]), torch.tensor([0, 1, 2])
    assert steps.tolist() == [0, 1, 2], "the last step has no noise"
    expected = (1.3 * chain_advantages(batch.reward, value, 0.9, 0.6)[walk, step]).exp()
    torch.testing.assert_close(weigh(Places(walk, step)), expected)


def test_advantages_are_normalised_over_the_stochastic_steps():
    batch = class_walks(mlp())
    for rule in ("batch", "group"):
        learner = Config(normalize=rule).learner(plain_task(mlp(), (1, 3, 2), 4), None, 0)
        a = learner._normalized(batch, learner._advantage(batch, torch.randn(24, 4)))
        assert a.shape == (24, 3)
        for part in [a] if rule == "batch" else [a[batch.group == g] for g in range(4)]:
            assert part.mean().item() == pytest.approx(0, abs=1e-5)
            assert part.std(correction=0).item() == pytest.approx(1, rel=1e-4)


def test_a_noised_sample_is_compared_with_the_value_of_its_state():
    batch = class_walks(mlp())
    learner = Config(**RAW | {"on": "noised", "beta": 0.7}).learner(plain_task(mlp(), (1, 3, 2), 4), None, 0)
    learner.critic.see(batch.reward)
    torch.nn.init.normal_(learner.critic.value.net.leave.weight)
    walk, x, t = torch.tensor([7, 2]), torch.randn(2, 1, 3, 2), tensor(0.3, 0.8)
    v = learner.critic.value(x, t, batch.group[walk]).detach()
    assert v.std() > 0
    found = learner._weigh(batch, learner._advantage(batch, learner.critic.along(batch)))(
        Places(walk, x=lambda: x, t=t)
    )
    torch.testing.assert_close(found, (0.7 * (batch.reward[walk] - v)).exp())


@pytest.mark.parametrize("rule", ["prompt", "batch"])
def test_a_mean_as_the_baseline_is_drwr_up_to_a_factor_of_each_prompt(rule):
    batch = ends_of(class_walks(mlp(), n=40))
    learner = Config(on="noised", advantage=rule, **RAW).learner(plain_task(mlp(), (1, 3, 2), 4), None, 5)
    assert learner.critic is None
    weight = learner._weigh(batch, learner._advantage(batch, None))(Places(torch.arange(40)))
    ratio = weight / batch.reward.exp()
    for part in [ratio] if rule == "batch" else [ratio[batch.group == g] for g in range(4)]:
        torch.testing.assert_close(part, part[:1].expand_as(part), rtol=1e-5, atol=0)
    same_as = drwr.Config(on="noised", normalize="group").learner(plain_task(mlp(), (1, 3, 2), 4), None, 5)
    ours = Config(on="noised", advantage=rule, normalize="group").learner(plain_task(mlp(), (1, 3, 2), 4), None, 5)
    assert ours.update(batch)["loss"] == pytest.approx(same_as.update(batch)["loss"], rel=1e-5)


@pytest.mark.parametrize("settings", [{"on": "centred"}, {"on": "noised"}, {"on": "chain", "advantage": "critic"}])
def test_a_saved_learner_continues_bit_for_bit(settings, tmp_path):
    points = plane_data(40)
    data = replace(points, x=points.x.repeat(1, 1, 3, 1))
    settings = {
        **settings,
        "kl": 0.1,
        "pretrain_weight": 0.2,
        "pretrain_batch": 8,
        "micro_batch": 31,
        "value_batch": 40,
    }
    batches = [class_walks(mlp(), seed=i) for i in range(4)]
    straight, resumed = (Config(**settings).learner(plain_task(mlp(seed), (1, 3, 2), 4), data, 5) for seed in (0, 9))
    for batch in batches[:2]:
        straight.update(batch)
    checkpoint.save(tmp_path, 2, {"learner": straight.state_dict()})
    resumed.load_state_dict(checkpoint.load(tmp_path / "step-00000002")["learner"])
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    assert same(straight.policy, resumed.policy)
    assert same(straight.critic.value, resumed.critic.value)
    assert straight.queries == resumed.queries == 4 * 24


def test_equal_rewards_teach_nothing_and_break_nothing():
    learner, batch = Config().learner(plain_task(mlp(), (1, 3, 2), 4), None, 0), class_walks(mlp())
    metrics = learner.update(replace(batch, reward=torch.ones(24)))
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["weight_ess"] == pytest.approx(1, rel=1e-4)
    learner.update(batch)
    assert learner.critic.value.std.item() == pytest.approx(batch.reward.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["eps", "flow", "TrigFlow", "consistency"])
def test_it_learns_with_every_kind_of_policy(name):
    first, last, std = learned_by(Config(lr=3e-3, ema_decay=0.0), name)
    assert last > first + std


def test_bad_rewards_are_refused():
    learner, batch = Config().learner(plain_task(mlp(), (1, 3, 2), 4), None, 0), class_walks(mlp())
    before = copy.deepcopy(learner.state_dict())
    batch.reward[2] = torch.nan
    with pytest.raises(NumericalError, match=r"\[2\]"):
        learner.update(batch)
    assert str(learner.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(lam=1.1), "lam = 1.1"),
        (lambda: Config(gamma=0), "gamma = 0"),
        (lambda: Config(on="noised", gamma=0.9), "gamma = 0.9: a noised sample"),
        (lambda: Config(beta=-1), "beta = -1"),
        (lambda: Config(value_lr=0), "value_lr = 0"),
        (lambda: Config(value_net="MPL()").learner(plain_task(mlp(), (1, 3, 2), 4), None, 0), "unknown network 'MPL'"),
        (lambda: Config(advantage="prompt", normalize="none").check(Plan(10, 1, 0, 20)), "samples_per_prompt = 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_what_workers_keep_is_what_is_used():
    assert Config().rollout_spec(5).path
    assert Config(on="noised").rollout_spec(5).path
    assert not Config(on="noised", advantage="batch").rollout_spec(5).path
    assert "V is fitted" in Config().plan()
    assert "V is" not in Config(advantage="prompt").plan()
