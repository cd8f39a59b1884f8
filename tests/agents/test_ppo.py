"""PPO with a value at every step: its gradient against the closed form, its advantages by hand, resuming."""

import copy
import math

import numpy as np
import pytest
import torch
from chains import Capture, affine, class_walks, collect, mlp
from quadratic import CHAINS, STEPS, THETA, assert_equal_in_expectation, task_of
from quadratic import reward as quadratic
from weighted import plain_task, same

from rlfusion.agents import AGENTS, ddpo
from rlfusion.agents.ppo import Config
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.rows import of_chain
from rlfusion.diffusion.schedule import Rectified
from rlfusion.rl.advantage import chain_advantages
from rlfusion.rl.agent import Plan

ONE = {"epochs": 1, "updates_per_epoch": 1, "kl_loss": 0.0, "micro_batch": 10**6, "value_epochs": 1}
RAW = {"normalize": "none", "advantage_clip": 1e9}


def learner_of(policy=None, seed: int = 0, **settings):
    return Config(**settings).learner(plain_task(policy or mlp(), (1, 3, 2), 4), None, seed)


@pytest.mark.parametrize("chain", CHAINS)
def test_with_lambda_1_the_expected_gradient_is_that_of_the_expected_reward_for_any_v(chain):
    """V is a network of random weights here, far from E[R | x_t], and a baseline all the same."""
    chain, made = CHAINS[chain]()
    policy, g = affine(THETA, **made), torch.Generator().manual_seed(1)
    learner = Config(lam=1.0, **ONE | RAW).learner(task_of(policy), None, 0)
    learner.optimization = Capture(policy)
    learner.critic.value.double()
    torch.nn.init.normal_(learner.critic.value.head.weight, std=0.1)
    learner.critic.fit = lambda *_: {}
    for _ in range(40):
        noise = torch.randn(3000, STEPS + 1, 2, generator=g, dtype=torch.float64)
        learner.update(collect(policy, learner.critic.times, noise, quadratic))
    ascent = -torch.stack(learner.optimization.gradients).numpy()
    truth = chain.gradient(np.array(THETA), chain.noisy)
    assert_equal_in_expectation((ascent.mean(0), ascent.std(0, ddof=1) / math.sqrt(40)), truth)


def test_each_step_has_its_own_advantage():
    """The gradient is that of DDPO's loss with A_k of Eq. (4) by hand at step k."""
    policy = mlp().double()
    batch, value = class_walks(mlp().double()), torch.randn(24, 4, generator=torch.Generator().manual_seed(0)).double()
    learner = learner_of(policy, gamma=0.9, lam=0.6, **ONE | RAW)
    learner.critic.along = lambda _: value
    learner.critic.fit = lambda *_: {}
    learner.optimization = Capture(policy)
    learner.update(batch)
    advantage = chain_advantages(batch.reward, value, 0.9, 0.6)
    other = ddpo.Learner(policy, batch.times, ddpo.Config(epochs=1, updates_per_epoch=1, kl_loss=0.0))
    places = other.transitions.all(torch.arange(24))
    other.transitions.accumulate(batch, *places, lambda t: -t.log_ratio.exp() * advantage[t.walk, t.step])
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(learner.optimization.gradients[0], expected)


def test_advantages_are_normalised_over_the_steps_with_noise():
    gae = torch.randn(24, 4)
    found = learner_of().normalized(gae)
    assert found[:, 3].tolist() == [0.0] * 24, "the last step has no noise"
    assert found[:, :3].mean().item() == pytest.approx(0, abs=1e-5)
    assert found[:, :3].std(correction=0).item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(learner_of(**RAW).normalized(gae)[:, :3], gae[:, :3])
    assert learner_of(advantage_clip=0.5).normalized(gae).abs().max() == 0.5


@pytest.mark.parametrize("settings", [{}, {"kl_loss": 0.0, "pace": 0.1, "normalize": "none"}])
def test_a_saved_learner_continues_bit_for_bit(settings):
    settings = {"micro_batch": 11, "value_batch": 40, **settings}
    batches = [class_walks(mlp(), seed=i) for i in range(4)]
    straight, resumed = (learner_of(mlp(seed), 5, **settings) for seed in (0, 9))
    for batch in batches[:2]:
        straight.update(batch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    assert same(straight.policy, resumed.policy)
    assert same(straight.critic.value, resumed.critic.value)
    assert straight.queries == resumed.queries == 4 * 24


def test_micro_batches_do_not_change_the_gradient():
    gradients = []
    for size in (10**6, 7):
        policy = mlp().double()
        learner = learner_of(policy, **ONE | {"micro_batch": size})
        learner.optimization = Capture(policy)
        learner.update(class_walks(mlp().double()))
        gradients += learner.optimization.gradients
    torch.testing.assert_close(*gradients)


def test_it_learns_and_so_does_v():
    policy = mlp()
    learner = learner_of(policy, lr=3e-3, value_lr=3e-3, ema_decay=0.0)
    told = [learner.update(class_walks(policy, n=200, seed=i)) for i in range(12)]
    assert told[-1]["reward"] > told[0]["reward"] + 0.2
    assert told[-1]["explained_variance"] > 0.05
    assert max(t["log_ratio_first"] for t in told) < 1e-3


def test_bad_rewards_are_refused_before_anything_changes():
    learner, batch = learner_of(), class_walks(mlp())
    before = str(learner.state_dict())
    batch.reward[3] = torch.nan
    with pytest.raises(NumericalError, match=r"\[3\]"):
        learner.update(batch)
    assert str(learner.state_dict()) == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(lam=1.1), "lam = 1.1"),
        (lambda: Config(value_lr=0), "value_lr = 0"),
        (lambda: Config(clip=0), "clip = 0"),
        (lambda: Config(dual_clip=1.1), "dual_clip = 1.1"),
        (lambda: Config(pace=0), "pace = 0"),
        (lambda: Config().check(Plan(1, 3, 0, 20)), "updates_per_epoch = 4"),
        (lambda: Config().check(Plan(10, 24, 2, 20)), "lag = 2: agent 'ppo'"),
        (lambda: learner_of(mlp(kernel=DDIM(0.0))), "no noise"),
        (lambda: learner_of(value_net="MPL()"), "unknown network 'MPL'"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_one_walk_a_prompt_will_do():
    Config().check(Plan(10, 1, 0, 20))
    assert "V is fitted" in AGENTS["ppo"]().plan()


def test_the_value_of_states_of_a_chain_is_that_of_their_times():
    policy = mlp()
    policy.denoiser.schedule = Rectified()
    critic, g = learner_of(policy).critic, torch.Generator().manual_seed(0)
    for parameter in critic.value.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=g)
    critic.see(torch.tensor([1.0, 3.0]))
    x, step = torch.randn(9, 1, 3, 2, generator=g), torch.randint(0, 4, (9,), generator=g)
    t, prompt = critic.times[step], torch.zeros(9, dtype=torch.int64)
    torch.testing.assert_close(critic.value(x, of_chain(critic.times, step)[0], prompt), critic.value(x, t, prompt))
