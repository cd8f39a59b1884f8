"""ReFL: its gradient against closed forms, its late steps, its links and its pretraining term."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import Capture, affine, flat_gradient, mlp
from plane import STD, assert_learns
from quadratic import (
    DDIM_V,
    GOAL,
    KAPPA,
    SEED,
    THETA,
    assert_equal_in_expectation,
    ddim_chain,
    ddim_levels,
    prefixes,
    task_of,
)

from rlfusion.agents.refl import Config, Identity, Relu, Softplus
from rlfusion.common.errors import ConfigError
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Guided
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.pretrain import Draws
from rlfusion.pretrain.denoising import Denoising
from rlfusion.rl.reward_gradient import PREFLIGHT, Learner
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.trajectory import Trajectory, concatenate

LATE = 0.5
BOTH = torch.arange(4000) % 2 + 2
"""Steps 2 and 3 of 4, the late half, each in half of the walks."""


def captured(config: Config, begin: torch.Tensor = BOTH, batches: int = 1) -> tuple[Learner, list[Trajectory]]:
    policy = affine(THETA, **DDIM_V)
    learner = config.learner(task_of(policy), None, SEED)
    learner.optimization = Capture(policy)
    return learner, [prefixes(policy, begin, i) for i in range(batches)]


def test_the_gradient_is_that_of_one_jump_from_late_constant_states():
    learner, batches = captured(Config(late=LATE, updates_per_epoch=1, micro_batch=10**6), batches=20)
    for batch in batches:
        learner.update(batch)
    ascent = -torch.stack(learner.optimization.gradients).numpy()
    a, b = ddim_levels()
    jumps = [ddim_chain()[0].cut(j, (a[j], -b[j], 0.0)) for j in (2, 3)]
    truth = np.mean([c.gradient(np.array(THETA), np.arange(len(c.p)) == len(c.p) - 1) for c in jumps], 0)
    assert_equal_in_expectation((ascent.mean(0), ascent.std(0, ddof=1) / math.sqrt(len(ascent))), truth, power=0.02)


def by_hand(batch: Trajectory, slope) -> np.ndarray:
    """The mean over walks of slope(R) dR/dtheta of the prediction x0 = (a - b theta_0) x - b theta_1."""
    a, b = (v[batch.begin.numpy()][:, None] for v in ddim_levels())
    x = batch.x[:, 0].numpy()
    gap = (a - b * THETA[0]) * x - b * THETA[1] - GOAL
    pull = slope(-KAPPA / 2 * (gap**2).sum(1)) * -KAPPA
    return np.array([(pull * (gap * -b * x).sum(1)).mean(), (pull * (gap * -b).sum(1)).mean()])


SLOPES = {
    "Identity()": lambda r: -np.ones_like(r),
    "Relu(goal=-0.2, scale=0.5)": lambda r: -0.5 * (r < -0.2),
    "Softplus(goal=-0.2, width=0.1)": lambda r: -1 / (1 + np.exp((r + 0.2) / 0.1)),
}


@pytest.mark.parametrize("link", SLOPES)
def test_each_link_has_its_slope(link):
    learner, (batch,) = captured(Config(late=LATE, updates_per_epoch=1, link=link, micro_batch=300))
    learner.update(batch)
    np.testing.assert_allclose(learner.optimization.gradients[0].numpy(), by_hand(batch, SLOPES[link]), rtol=1e-9)


def test_links_have_their_values():
    r = torch.tensor([-1.0, 0.5, 3.0])
    torch.testing.assert_close(Identity()(r), -r)
    torch.testing.assert_close(Relu()(r), torch.tensor([3e-3, 1.5e-3, 0.0]))
    torch.testing.assert_close(Softplus(1.0, 0.5)(r), 0.5 * torch.log1p(torch.exp((1.0 - r) / 0.5)))


def test_the_kl_is_the_distance_of_the_predictions():
    learner, (batch,) = captured(Config(late=LATE, updates_per_epoch=1, kl_loss=0.3, kl_std=0.4, micro_batch=300))
    with torch.no_grad():
        learner.paths.reference.denoiser.net.theta.add_(torch.tensor([0.2, -0.1], dtype=torch.float64))
    metrics = learner.update(batch)
    b, x = ddim_levels()[1][batch.begin.numpy()][:, None], batch.x[:, 0].numpy()
    gap = b * (0.2 * x - 0.1)  # x0_hat - x0_ref, with x0_hat = a x - b (theta_0 x + theta_1)
    assert metrics["kl"] == pytest.approx((gap**2).sum(1).mean() / (2 * 0.4**2), rel=1e-9)
    kl = [(gap * -b * x).sum(1).mean() / 0.4**2, (gap * -b).sum(1).mean() / 0.4**2]
    expected = by_hand(batch, SLOPES["Identity()"]) + 0.3 * np.array(kl)
    np.testing.assert_allclose(learner.optimization.gradients[0].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("late", "steps", "first"), [(0.25, 40, 30), (0.25, 20, 15), (0.25, 3, 2), (0.01, 40, 39), (1.0, 7, 0)]
)
def test_the_late_steps_are_the_last_share(late, steps, first):
    rollout_spec = Config(late=late).rollout_spec(steps)
    assert (rollout_spec.first, rollout_spec.last, rollout_spec.end) == (first, steps - 1, False)


# The whole learner on a class-conditional net


def data_of() -> Dataset:
    g = torch.Generator().manual_seed(0)
    return Dataset(torch.rand(40, 1, 3, 2, generator=g) * 2 - 1, torch.arange(40) % 4, ("a", "b", "c", "d"))


def mlp_learner(seed: int = 0, guided: bool = True, **settings) -> tuple[Learner, Task]:
    policy = mlp(seed)
    if guided:
        policy = Policy(Guided(policy.denoiser, 1.5, torch.tensor([4])), DDIM(0.0))
    task = Task(policy, TimeGrid(4), (1, 3, 2), torch.arange(4), lambda x: x, lambda x, _: x.mean((1, 2, 3)), "mean")
    return Config(**{"updates_per_epoch": 1} | settings).learner(task, data_of(), SEED), task


def rollout(task: Task, config: Config, iteration: int) -> Trajectory:
    work = plan(SEED, iteration, 4, 6, 10, 4, 0)
    return concatenate([run_item(replace(task, rollout_spec=config.rollout_spec(4)), item) for item in work])


def test_workers_send_states_from_each_late_step():
    learner, task = mlp_learner(late=0.75)
    batch = rollout(task, learner.config, 0)
    assert set(batch.begin.tolist()) == {1, 2, 3}
    metrics = learner.update(batch)
    x0 = task.policy.denoiser(batch.x[:, 0], batch.times[batch.begin], batch.cond).x0
    assert metrics["reward"] == pytest.approx(-metrics["loss"])
    assert metrics["reward"] != pytest.approx(x0.mean().item())  # of the weights before the step, not after it
    assert learner.queries == 24


@pytest.mark.parametrize("guided", [True, False])
def test_the_pretraining_term_is_the_base_models_own_loss_on_its_own_data(guided):
    settings = {"pretrain_loss": "Denoising(weight='SNR()')", "pretrain_batch": 8, "updates_per_epoch": 3}
    found = {}
    for weight in (0.0, 0.7):
        learner, task = mlp_learner(guided=guided, pretrain_weight=weight, **settings)
        learner.optimization = Capture(learner.policy)
        for i in range(2):
            metrics = learner.update(rollout(task, learner.config, i))
        found[weight] = learner.optimization.gradients
        assert ("more" in metrics) == (weight > 0)
    draw = Draws(data_of(), 8, 0.1, 1, torch.device("cpu"), SEED, "refl")
    inner = task.policy.denoiser.denoiser if guided else task.policy.denoiser
    for step in range(6):
        task.policy.zero_grad()
        (0.7 * Denoising(weight="SNR()")(inner, inner, draw(step)).mean()).backward()
        expected = flat_gradient(task.policy)
        assert expected.norm() > 0.01
        torch.testing.assert_close(found[0.7][step] - found[0.0][step], expected, rtol=1e-4, atol=1e-5)


def test_a_saved_learner_continues_bit_for_bit():
    rich = {"pretrain_weight": 0.5, "kl_loss": 0.1, "epochs": 2, "updates_per_epoch": 2, "ema_decay": 0.5}
    (straight, task), batches = mlp_learner(**rich), []
    for i in range(4):
        batches.append(rollout(task, straight.config, i))
        if i < 2:
            straight.update(batches[-1])
    held = io.BytesIO()
    torch.save(straight.state_dict(), held)
    resumed, _ = mlp_learner(seed=99, **rich)
    held.seek(0)
    resumed.load_state_dict(torch.load(held))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    for one, other in zip(straight.policy.parameters(), resumed.policy.parameters()):
        assert torch.equal(one, other)


def test_a_link_that_is_flat_on_the_base_is_refused():
    learner, task = mlp_learner(link="Relu(goal=-50.0)")
    with pytest.raises(ConfigError, match=r"the loss is flat.*link"):
        learner.preflight(rollout(task, learner.config, PREFLIGHT))


def test_the_preflight_keeps_no_graph(monkeypatch):
    """It goes backwards once: a graph that is kept for a second pass holds its activations through both."""
    learner, task = mlp_learner()
    batch, grad, kept = rollout(task, learner.config, PREFLIGHT), torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: kept.append(k.get("retain_graph")) or grad(*a, **k))
    learner.preflight(batch)
    assert kept == [None]


def test_it_moves_a_mixture_to_the_rewarded_mode_and_the_kl_keeps_its_spread():
    assert_learns(Config(lr=3e-3, updates_per_epoch=1), Config(lr=3e-3, updates_per_epoch=1, kl_loss=0.03, kl_std=STD))


def test_the_pretraining_term_keeps_the_spread_too():
    assert_learns(Config(lr=3e-3, updates_per_epoch=1), Config(lr=3e-3, updates_per_epoch=1, pretrain_weight=0.3))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"late": 0.0}, "late = "),
        ({"late": 1.1}, "late = "),
        ({"link": "Rleu()"}, "did you mean 'Relu'"),
        ({"link": "Relu(scale=0.0)"}, "scale = "),
        ({"link": "Softplus(width=-1.0)"}, "width = "),
        ({"pretrain_weight": -1.0}, "pretrain_weight = "),
        ({"pretrain_batch": 0}, "pretrain_batch = "),
        ({"pretrain_loss": "Denoisng()"}, "did you mean 'Denoising'"),
        ({"label_dropout": 2.0}, "label_dropout = "),
        ({"updates_per_epoch": 0}, "updates_per_epoch = "),
    ],
)
def test_settings_that_cannot_work_are_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        Config(**settings)
    assert "last 25%" in Config().plan()
