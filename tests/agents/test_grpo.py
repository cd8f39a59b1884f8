"""GRPO: its gradient over a window against the closed form, its advantages by hand, where it is DDPO, and resuming."""

import copy
import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from chains import Capture, affine, class_walks, collect, mlp
from quadratic import CHAINS, STEPS, THETA, assert_equal_in_expectation, ddim_levels, reward, task_of

from rlfusion.agents import ddpo, grpo
from rlfusion.agents.grpo import Config, Learner
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.objectives import clipped_surrogate
from rlfusion.rl.agent import Plan
from rlfusion.rollout import RolloutSpec, Task, plan, run_item

TIMES = TimeGrid(4).times(Cosine())
ONE = {"epochs": 1, "updates_per_epoch": 1, "kl_loss": 0.0}


def gradient(batch, config: Config, policy, iteration: int = 0) -> torch.Tensor:
    learner = Learner(policy, batch.times, config)
    learner.optimization, learner.iteration = Capture(policy), iteration
    learner.update(batch)
    return learner.optimization.gradients[0]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("first", [0, 1])
def test_the_expected_gradient_is_that_of_the_steps_in_the_window(chain, first):
    """With the mean of all walks as the baseline, which for n walks takes 1 / n off the gradient."""
    chain, made = CHAINS[chain]()
    policy, g = affine(THETA, **made), torch.Generator().manual_seed(1)
    times, n, batches = TimeGrid(STEPS).times(made["schedule"]), 4000, 60
    learner = Learner(policy, times, Config(std="none", advantage_clip=1e9, window=2, micro_batch=10**6, **ONE))
    learner.optimization = Capture(policy)
    for _ in range(batches):
        learner.iteration = first
        noise = torch.randn(n, STEPS + 1, 2, generator=g, dtype=torch.float64)
        learner.update(collect(policy, times, noise, reward))
    ascent = -torch.stack(learner.optimization.gradients).numpy() / (1 - 1 / n)
    truth = chain.gradient(np.array(THETA), (np.arange(STEPS) >= first) & (np.arange(STEPS) < first + 2))
    assert_equal_in_expectation((ascent.mean(0), ascent.std(0, ddof=1) / math.sqrt(batches)), truth)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(("first", "stride"), [(0, 1), (1, 1), (0, 2), (1, 3)])
def test_where_walks_take_no_noise_outside_it_is_that_of_the_noise_in_the_window(chain, first, stride):
    """The chain of closed form has DDIM(0)'s steps outside, written by the oracle's own numbers; after the window as
    long as they are to be.
    """
    full, made = CHAINS[chain]()
    levels = (
        ddim_levels() if chain == "ddim" else (np.array([0, 0.25, 0.5, 0.75, 1]), np.array([1, 0.75, 0.5, 0.25, 0]))
    )
    end = first + 2
    at = [*range(end), *range(end, STEPS, stride), STEPS]
    steps = len(at) - 1
    mixed = replace(full, **{name: getattr(full, name)[:steps].copy() for name in ("p", "q", "std")})
    for k, ((a, b), (a_s, b_s)) in enumerate(pairwise(zip(*(level[at] for level in levels)))):
        if not first <= k < end:  # x0 = a x - b y, eps = b x + a y of v; x0 = x - t y, eps = x + (1 - t) y of flow
            row = (a_s * a + b_s * b, b_s * a - a_s * b) if chain == "ddim" else (1.0, b_s - b)
            mixed.p[k], mixed.q[k], mixed.std[k] = *row, 0.0
    policy, times, n, batches = affine(THETA, **made), TimeGrid(STEPS).times(made["schedule"]), 3000, 25
    settings = {"window": 2, "outside": "ode", "outside_stride": stride}
    config = Config(std="none", advantage_clip=1e9, micro_batch=10**6, **settings, **ONE)
    learner, task = Learner(policy, times, config), replace(task_of(policy), rollout_spec=config.rollout_spec(STEPS))
    learner.optimization = Capture(policy)
    within = (np.arange(steps) >= first) & (np.arange(steps) < end)
    for seed in range(batches):
        learner.iteration = first
        walks = run_item(task, plan(seed, first, 1, n, n, 1, first)[0])
        assert torch.equal(walks.times, times[at])
        assert (~walks.log_prob.isnan()).all(0).tolist() == within.tolist()
        learner.update(walks)
    ascent = -torch.stack(learner.optimization.gradients).double().numpy() / (1 - 1 / n)
    truth = mixed.gradient(np.array(THETA), within)
    assert_equal_in_expectation((ascent.mean(0), ascent.std(0, ddof=1) / math.sqrt(batches)), truth)


@pytest.mark.parametrize("flash", [{}, {"outside_stride": 2, "start": "prompt"}])
def test_walks_without_noise_outside_are_on_policy_in_every_window_and_learned_from_with_a_reference(flash):
    policy = mlp()
    config = Config(window=1, outside="ode", kl_loss=0.1, epochs=1, updates_per_epoch=2, micro_batch=7, **flash)
    spec = config.rollout_spec(4)
    assert RolloutSpec(**json.loads(json.dumps(asdict(spec)))) == spec
    task = Task(policy, TimeGrid(4), (1, 3, 2), torch.arange(4), lambda x: x, lambda x, _: x.mean((1, 2, 3)), "mean")
    learner, firsts = Learner(policy, task.times, config), []
    for iteration in range(4):
        acting = replace(task, policy=frozen_copy(policy), rollout_spec=spec)
        batch = run_item(acting, plan(0, iteration, 4, 6, 24, 4, iteration)[0])
        assert learner.preflight(batch)["log_ratio_max"] < 1e-4
        told = learner.update(batch)
        firsts.append(told["window_first"])
        assert told["log_ratio_first"] < 1e-4
        assert all(math.isfinite(value) for value in told.values())
        assert told["kl"] >= 0
    assert firsts == [0, 1, 2, 0]
    stale = replace(batch, version=learner.iteration - 1)
    assert 0 < learner.update(stale)["behaviour_ess"] <= 1


def test_over_all_steps_it_is_ddpo_with_group_advantages():
    policy = mlp().double()
    batch = class_walks(policy)
    mine = gradient(batch, Config(**ONE), policy)
    learner = ddpo.Learner(policy, TIMES, ddpo.Config(epochs=1, updates_per_epoch=1, kl_loss=0.0))
    learner.optimization = Capture(policy)
    learner.update(batch)
    torch.testing.assert_close(mine, learner.optimization.gradients[0])


def test_micro_batches_do_not_change_the_gradient():
    policy = mlp().double()
    batch = class_walks(policy)
    whole, parts = (gradient(batch, Config(window=2, micro_batch=size, **ONE), policy) for size in (10**6, 7))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("group", [-1, 1, -1, 1]),
        ("batch", [-1 / math.sqrt(5), 1 / math.sqrt(5), -1 / math.sqrt(5), 1 / math.sqrt(5)]),
        ("none", [-1, 1, -1, 1]),
    ],
)
def test_advantages_by_hand(std, expected):
    """Rewards 0, 2 of one prompt and 4, 6 of another: std 1 in each, sqrt(5) in all."""
    learner = Learner(mlp(), TIMES, Config(std=std))
    got = learner.advantages(torch.tensor([0.0, 2.0, 4.0, 6.0]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_the_window_slides_from_noise_to_data_and_begins_anew():
    learner = Learner(mlp(), TimeGrid(8).times(Cosine()), Config(window=3, window_stride=2, window_every=2))
    assert learner.transitions.steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    windows = [learner.trained(i).tolist() for i in range(8)]
    assert windows[::2] == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [0, 1, 2]]
    assert windows[1::2] == windows[::2]
    uneven = Learner(mlp(), TimeGrid(8).times(Cosine()), Config(window=4, window_stride=2))
    assert [uneven.trained(i).tolist()[0] for i in range(4)] == [0, 2, 3, 0]


def test_a_lopsided_clip_by_hand():
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    loss = clipped_surrogate(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), (0.1, 0.3))
    torch.testing.assert_close(loss, torch.tensor([-1.3, 1.5, -0.5, 0.9]))


@pytest.mark.parametrize(("low", "high", "clipped"), [(0.1, 0.3, False), (0.3, 0.1, True)])
def test_each_side_of_the_clip_is_its_own(low, high, clipped):
    """Ratios of 1.25 are held by c_high alone."""
    policy = mlp().double()
    batch = class_walks(policy)
    batch = replace(batch, log_prob=batch.log_prob - math.log(1.25))
    free = gradient(batch, Config(clip_low=9.0, clip_high=9.0, dual_clip=None, **ONE), policy)
    held = gradient(batch, Config(clip_low=low, clip_high=high, dual_clip=None, **ONE), policy)
    assert torch.allclose(held, free) != clipped


@pytest.mark.parametrize("module", [grpo, ddpo])
def test_the_gap_before_the_first_step_is_told(module):
    policy, more = mlp(), {"lr": 1e-2, "epochs": 2, "updates_per_epoch": 2}
    batch = class_walks(policy)
    metrics = module.Learner(policy, TIMES, module.Config(**more)).update(batch)
    assert metrics["log_ratio_first"] < 1e-5 < 0.1 < metrics["log_ratio_max"]
    policy = mlp()
    off = replace(batch, log_prob=batch.log_prob + 0.01)
    metrics = module.Learner(policy, TIMES, module.Config(**more)).update(off)
    assert metrics["log_ratio_first"] == pytest.approx(0.01, rel=1e-2)


def test_a_saved_learner_continues_bit_for_bit():
    settings = Config(window=2, micro_batch=11)
    batches = [class_walks(mlp(), seed=i) for i in range(4)]
    straight, resumed = Learner(mlp(), TIMES, settings, 5), Learner(mlp(seed=9), TIMES, settings, 5)
    for batch in batches[:2]:
        straight.update(batch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    for mine, theirs in zip(straight.policy.parameters(), resumed.policy.parameters()):
        assert torch.equal(mine, theirs)
    assert straight.queries == resumed.queries == 4 * 24


def test_it_learns():
    policy = mlp()
    learner = Learner(policy, TIMES, Config(lr=3e-3, ema_decay=0.0))
    rewards = [learner.update(class_walks(policy, n=200, seed=i))["reward"] for i in range(12)]
    assert rewards[-1] > rewards[0] + 0.2


def test_bad_rewards_are_refused_before_anything_changes():
    policy = mlp()
    batch = class_walks(policy)
    batch.reward[3] = torch.nan
    with pytest.raises(NumericalError, match=r"\[3\]"):
        Learner(policy, TIMES, Config()).update(batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": -1}, "window = -1"),
        ({"outside": "ode"}, "outside = ode with window = 0"),
        ({"window": 2, "outside_stride": 2}, "outside_stride = 2, outside = noise: expected 1, or ode"),
        ({"window": 2, "outside": "ode", "outside_stride": 0}, "outside_stride = 0"),
        ({"clip_high": 0}, "clip_high = 0"),
        ({"dual_clip": 1.1}, "dual_clip = 1.1"),
        ({"window_every": 0}, "window_every = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Config(**settings)


def test_chains_and_plans_that_cannot_serve_are_refused():
    with pytest.raises(ConfigError, match="window = 9: expected at most the 3 stochastic steps"):
        Learner(mlp(), TIMES, Config(window=9))
    with pytest.raises(ConfigError, match="no noise"):
        Learner(mlp(kernel=DDIM(0.0)), TIMES, Config())
    with pytest.raises(ConfigError, match="samples_per_prompt = 1"):
        Config().check(Plan(10, 1, 0, 20))
    with pytest.raises(ConfigError, match="updates_per_epoch = 4"):
        Config().check(Plan(1, 3, 0, 20))
    flash = Config(window=3, outside="ode", outside_stride=2)
    flash.check(Plan(4, 6, 0, 5))
    with pytest.raises(ConfigError, match="outside_stride = 2: the window leaves no two steps, expected 1"):
        flash.check(Plan(4, 6, 0, 4))
    assert "2 steps at once after it" in flash.plan()
    assert "begin alike" in Config(start="prompt").plan()
