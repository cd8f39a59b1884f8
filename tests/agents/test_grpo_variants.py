"""What GRPO takes from its successors: ratios normalised by step, masks by divergence, drawn steps, a reference that
follows, the leave-one-out baseline.
"""

import copy
import math

import numpy as np
import pytest
import torch
from chains import Capture, affine, all_transitions, class_walks, collect, mlp
from quadratic import STEPS, THETA, ddim_chain, reward

from rlfusion.agents.grpo import Config, Learner
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.schedule import Cosine
from rlfusion.objectives import masked_surrogate
from rlfusion.rl.advantage import relative
from rlfusion.rl.agent import Plan
from rlfusion.rl.transitions import step_weights

TIMES = TimeGrid(4).times(Cosine())
ONE = {"epochs": 1, "updates_per_epoch": 1, "kl_loss": 0.0, "micro_batch": 50}
NOW = [t + 0.15 for t in THETA]
CLIP, DUAL = 0.1, 1.3


def walked(n: int = 64):
    """(walks of ``THETA``, the settings of their chain)."""
    _, made = ddim_chain()
    noise = torch.randn(n, STEPS + 1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return collect(affine(THETA, **made), TimeGrid(STEPS).times(made["schedule"]), noise, reward), made


def parts(batch, made, theta) -> tuple[np.ndarray, np.ndarray]:
    """log r and D of every transition (B, K), by arithmetic on the means of two policies."""
    walk, step = all_transitions(batch)
    obs, action = batch.transitions(walk, step)
    with torch.no_grad():
        (old, std), (now, _) = (affine(t, **made)(obs) for t in (THETA, theta))
        square = [((action - mean) / std).square().sum(1) / 2 for mean in (old, now)]
        apart = ((now - old) / std).square().sum(1) / 2
    return tuple(v.reshape(len(batch), -1).numpy() for v in (square[0] - square[1], apart))


def surrogate(log_ratio: np.ndarray, a: np.ndarray) -> np.ndarray:
    r = np.minimum(np.exp(log_ratio), DUAL)
    return np.minimum(r * a, np.clip(r, 1 - CLIP, 1 + CLIP) * a)


@pytest.mark.parametrize("per_dim", [False, True])
@pytest.mark.parametrize("form", ["ratio_norm", "divergence", "both"])
def test_the_gradient_is_the_finite_difference_of_the_objective_in_float64(form, per_dim):
    batch, made = walked()
    limit, features = 0.02, 2 if per_dim else 1
    settings = {"ratio_norm": form != "divergence", "divergence": None if form == "ratio_norm" else limit / features}
    config = Config(**ONE, **settings, clip_low=CLIP, clip_high=CLIP, dual_clip=DUAL, clip_per_dim=per_dim)
    policy = affine(THETA, **made)
    learner = Learner(policy, batch.times, config)
    advantage = learner.advantages(batch.reward, batch.group)
    objective = learner._objective(batch, learner.transitions, advantage, None)
    with torch.no_grad():
        for parameter, now in zip(policy.parameters(), affine(NOW, **made).parameters()):
            parameter.copy_(now)
    records = learner.transitions.accumulate(batch, *learner.transitions.all(torch.arange(len(batch))), objective)
    found = -torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).numpy()

    stds = policy.stds(batch.times).numpy()
    share, a = (stds / stds[stds > 0].mean())[None, learner.transitions.steps.numpy()], advantage.numpy()[:, None]
    held = parts(batch, made, NOW)
    away = held[1] > limit

    def value(theta) -> float:
        log_ratio, apart = parts(batch, made, theta)
        log_ratio = share * (log_ratio + apart) if settings["ratio_norm"] else log_ratio
        if settings["divergence"] is None:
            return surrogate(log_ratio / features, a).sum(1).mean()
        before = share * (held[0] + held[1]) if settings["ratio_norm"] else held[0]
        free = np.minimum(np.exp(log_ratio / features), DUAL) * a
        return np.where(away & (before * a > 0), 0, free).sum(1).mean()

    h = 1e-6
    expected = [(value(NOW + h * e) - value(NOW - h * e)) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert 0 < away.mean() < 1

    before = (share * (held[0] + held[1]) if settings["ratio_norm"] else held[0]) / features
    clipped = np.abs(np.exp(before) - 1) > CLIP if settings["divergence"] is None else away & (before * a > 0)
    assert 0 < clipped.mean() < 1
    told = learner.transitions.summary(records, CLIP, features)
    assert told["clip_fraction"] == pytest.approx(clipped.mean(), abs=1e-6)


def test_a_normalised_ratio_has_no_drift_and_one_spread():
    """log r of walks of the old weights has the mean -D and the variance 2 D."""
    batch, made = walked(20_000)
    log_ratio, apart = parts(batch, made, NOW)
    np.testing.assert_allclose((log_ratio + apart).mean(0), 0, atol=0.01)
    np.testing.assert_allclose(log_ratio.mean(0), -apart.mean(0), atol=0.01)
    np.testing.assert_allclose((log_ratio + apart).var(0), 2 * apart.mean(0), rtol=0.1)
    assert apart.mean(0).max() > 0.03


def test_a_mask_by_hand():
    """A > 0 with r > 1 and A < 0 with r < 1 lead away: no gradient beyond the limit; back is free."""
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.5], requires_grad=True)
    advantage, divergence = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]), torch.tensor([0.3, 0.3, 0.3, 0.3, 0.1])
    loss = masked_surrogate(log_ratio, advantage, divergence, 0.2)
    torch.testing.assert_close(loss.detach(), -log_ratio.detach().exp() * advantage)
    loss.sum().backward()
    free = -log_ratio.detach().exp() * advantage
    torch.testing.assert_close(log_ratio.grad, free * torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    held = masked_surrogate(log_ratio.detach() + 9, advantage, divergence, 0.2, dual_clip=1.5)
    torch.testing.assert_close(held, -1.5 * advantage)


def gradient(batch, policy, iteration: int = 0, **settings) -> torch.Tensor:
    learner = Learner(policy, batch.times, Config(**ONE | settings))
    learner.optimization, learner.iteration = Capture(policy), iteration
    learner.update(batch)
    return learner.optimization.gradients[0]


@pytest.mark.parametrize("window", [0, 2])
def test_drawn_steps_stand_for_all_of_the_window(window):
    """The mean over many draws is the gradient of all; a walk trains as many steps as it is told."""
    policy = mlp().double()
    batch = class_walks(policy)
    whole, steps = gradient(batch, policy, window=window), 2 if window else 3
    one = {"window": window, "window_every": 10**6, "step_draws": 1}
    drawn = torch.stack([gradient(batch, policy, i, **one) for i in range(60)])
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - whole).abs() < 5 * error + 1e-12).all()
    assert error.norm() < whole.norm() / 5 < drawn.std(0).norm()
    torch.testing.assert_close(gradient(batch, policy, window=window, step_draws=steps), whole)


@pytest.mark.parametrize("settings", [{"ratio_norm": True}, {"divergence": 0.05}])
def test_at_the_old_weights_nothing_is_masked_and_a_norm_is_a_weight(settings):
    """The gradient there is that of log r, by Eq. (4) of ``transitions`` for ratio_norm."""
    policy = mlp().double()
    batch = class_walks(policy)
    plain = gradient(batch, policy, step_weight="noise" if "ratio_norm" in settings else "none")
    torch.testing.assert_close(gradient(batch, policy, **settings), plain)
    assert step_weights(policy, batch.times, "noise").std() > 0.1


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_the_reference_follows_every_so_many_rollouts_or_when_the_policy_is_far():
    policy = mlp()
    learner = Learner(policy, TIMES, Config(lr=1e-2, kl_loss=0.1, reference_every=2))
    for i in range(4):
        learner.update(class_walks(policy, seed=i))
        assert same(learner.transitions.reference, policy) == (i % 2 == 1)
    for limit, moved in ((1e-9, True), (1e9, False)):
        learner = Learner(policy, TIMES, Config(lr=1e-2, kl_loss=0.1, reference_kl=limit))
        learner.update(class_walks(policy))
        assert same(learner.transitions.reference, policy) == moved


def test_a_saved_learner_with_all_of_it_continues_bit_for_bit():
    settings = Config(
        window=2, ratio_norm=True, divergence=0.1, step_draws=1, reference_every=3, baseline="leave_one_out"
    )
    batches = [class_walks(mlp(), seed=i) for i in range(4)]
    straight, resumed = Learner(mlp(), TIMES, settings, 5), Learner(mlp(seed=9), TIMES, settings, 5)
    for batch in batches[:2]:
        straight.update(batch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    assert same(straight.policy, resumed.policy)


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("mean", "none", [-2, 0, 2, 0, 0]),
        ("leave_one_out", "none", [-3, 0, 3, 0, 0]),
        ("leave_one_out", "group", [-1.5 * math.sqrt(1.5), 0, 1.5 * math.sqrt(1.5), 0, 0]),
    ],
)
def test_baselines_by_hand(baseline, scale, expected):
    """Rewards 0, 2, 4 of one prompt (std sqrt(8/3)), and prompts of one walk, whose reward has no baseline: 0."""
    found = relative(torch.tensor([0.0, 2.0, 4.0, 7.0, 9.0]), torch.tensor([5, 5, 5, 1, 2]), baseline, scale, 9.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)
    held = relative(torch.tensor([0.0, 2.0, 4.0]), torch.tensor([5, 5, 5]), baseline, scale, 1.0)
    assert held.tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(divergence=0.0), "divergence = 0.0"),
        (lambda: Config(ratio_norm=True, step_weight="noise"), "step_weight = noise: ratio_norm"),
        (lambda: Config(kl_loss=0.0, reference_every=3), "kl_loss = 0"),
        (lambda: Config(kl_loss=0.0, reference_kl=1.0), "kl_loss = 0"),
        (lambda: Config(reference_kl=-1.0), "reference_kl = -1"),
        (lambda: Config(reference_every=-1), "reference_every = -1"),
        (lambda: Config(step_draws=3, window=2), "step_draws = 3: .* window = 2"),
        (lambda: Config(step_draws=-1), "step_draws = -1"),
        (lambda: Learner(mlp(), TIMES, Config(step_draws=4)), "step_draws = 4: .* 3 stochastic steps"),
        (lambda: Config(ratio_norm=True, decoupled=False).check(Plan(4, 8, 1, 20)), "lag = 1, decoupled = False"),
        (lambda: Config(divergence=0.1, decoupled=False).check(Plan(4, 8, 1, 20)), "lag = 1, decoupled = False"),
    ],
)
def test_what_has_no_meaning_is_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
