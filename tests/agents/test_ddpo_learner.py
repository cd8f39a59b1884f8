"""The DDPO learner as a whole: metrics, state, guards, averaged weights, settings."""

import copy
import io
import math

import pytest
import torch
from chains import Capture, class_walks, flat_gradient, mlp

from rlfusion.agents.ddpo import Config, Learner
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.schedule import Cosine
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.training.optimization import EMA

TIMES = TimeGrid(4).times(Cosine())
RICH = Config(
    advantage="prompt",
    epochs=2,
    updates_per_epoch=2,
    step_fraction=0.7,
    kl_loss=0.05,
    kl_reward=0.02,
    ema_decay=0.9,
    lr=1e-2,
)

ONE = {"epochs": 1, "updates_per_epoch": 1, "kl_loss": 0.0, "ema_decay": 0.0, "lr": 3e-4}


def weights(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(batch: Trajectory, **fields) -> Trajectory:
    return Trajectory(**vars(batch) | fields)


def test_a_saved_learner_continues_bit_for_bit():
    policy = mlp()
    batches = [class_walks(policy, seed=i) for i in range(4)]
    straight = Learner(policy, TIMES, RICH, seed=5)
    for batch in batches[:2]:
        straight.update(batch)
    held = io.BytesIO()
    torch.save(straight.state_dict(), held)
    resumed = Learner(mlp(seed=99), TIMES, RICH, seed=5)
    held.seek(0)
    resumed.load_state_dict(torch.load(held))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    for name, value in weights(straight.policy).items():
        assert torch.equal(value, weights(resumed.policy)[name]), name
        assert torch.equal(straight.optimization.ema.shadow[name], resumed.optimization.ema.shadow[name]), name
    assert straight.running.history.keys() == resumed.running.history.keys() == {0, 1, 2, 3}
    assert all(torch.equal(h, resumed.running.history[g]) for g, h in straight.running.history.items())
    kept, found = (learner.transitions.reference.state_dict() for learner in (straight, resumed))
    assert all(torch.equal(value, found[name]) for name, value in kept.items())


def test_an_update_raises_what_the_reward_measures():
    policy = mlp()
    learner = Learner(policy, TIMES, Config(**ONE | {"lr": 2e-2}))
    first = class_walks(policy, n=400).reward.mean()
    for i in range(15):
        metrics = learner.update(class_walks(policy, n=400, seed=i))
    assert class_walks(policy, n=400).reward.mean() > first + 3 * metrics["reward_std"] / math.sqrt(400)


def test_the_first_update_of_a_rollout_is_on_policy():
    policy = mlp()
    batch = class_walks(policy)
    metrics = Learner(policy, TIMES, Config(**ONE)).update(batch)
    assert metrics["log_ratio_max"] < 1e-5
    assert metrics["clip_fraction"] == 0
    assert metrics["reward"] == pytest.approx(batch.reward.mean().item())
    assert metrics["advantage_std"] == pytest.approx(1, abs=0.1)
    assert "kl" not in metrics
    assert "gives 1 update" in Config(**ONE).plan()
    assert "gives 6 update(s): the first is on-policy" in Config(epochs=3, updates_per_epoch=2).plan()


def test_a_non_finite_reward_changes_nothing():
    policy = mlp()
    learner, batch = Learner(policy, TIMES, RICH), class_walks(policy)
    learner.update(batch)
    before, running = weights(policy), copy.deepcopy(learner.running.history)
    bad = batch.reward.clone()
    bad[[3, 7]] = torch.tensor([math.nan, math.inf])
    with pytest.raises(NumericalError, match=r"\[3, 7\]"):
        learner.update(changed(batch, reward=bad))
    assert all(torch.equal(v, before[k]) for k, v in weights(policy).items())
    assert all(torch.equal(h, learner.running.history[g]) for g, h in running.items())


def test_a_non_finite_gradient_is_named_and_not_taken():
    policy = mlp()
    learner, batch = Learner(policy, TIMES, Config(**ONE)), class_walks(policy)
    before, state = weights(policy), copy.deepcopy(learner.optimization.optimizer.state_dict())
    x = batch.x.clone()
    x[0, 1] = math.nan
    with pytest.raises(NumericalError, match=r"denoiser\.net\."):
        learner.update(changed(batch, x=x))
    assert all(torch.equal(v, before[k]) for k, v in weights(policy).items())
    assert learner.optimization.optimizer.state_dict() == state
    assert all(p.grad is None for p in policy.parameters())
    learner.update(batch)


def test_the_gradient_norm_is_clipped_and_reported_unclipped():
    policy, twin = mlp(), mlp()
    batch = class_walks(policy)
    learner = Learner(policy, TIMES, Config(form="sf", max_grad_norm=1e-3, **ONE))
    other = Learner(twin, TIMES, Config(form="sf", **ONE))
    other.optimization = Capture(twin)
    other.update(batch)
    seen = []
    step = learner.optimization.optimizer.step
    learner.optimization.optimizer.step = lambda: (seen.append(flat_gradient(policy).norm().item()), step())
    norm = learner.update(batch)["grad_norm"]
    assert norm == pytest.approx(other.optimization.gradients[0].norm().item(), rel=1e-5)
    assert norm > 1e-2
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_ema_is_the_warmed_up_average():
    module = torch.nn.Linear(2, 1)
    ema, shadow = EMA(module, 0.3), module.weight.detach().clone()
    for n in range(4):
        with torch.no_grad():
            module.weight.add_(1.0)
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))
        shadow = decay * shadow + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.shadow["weight"], shadow)
    raw = module.weight.detach().clone()
    with ema.averaged():
        torch.testing.assert_close(module.weight.detach(), shadow)
    assert torch.equal(module.weight, raw)
    torch.testing.assert_close(ema.shadow["weight"], shadow)
    plain = EMA(module, 0.0)
    with torch.no_grad():
        module.weight.add_(1.0)
    plain.update()
    assert torch.equal(plain.shadow["weight"], module.weight)
    with pytest.raises(ValueError, match="decay"):
        EMA(module, 1.0)


def test_a_chain_without_noise_is_refused():
    with pytest.raises(ConfigError, match="eta > 0"):
        Learner(mlp(kernel=DDIM(0.0)), TIMES, Config())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"form": "sf", "epochs": 2}, "epochs"),
        ({"form": "sf", "epochs": 1, "updates_per_epoch": 2}, "updates_per_epoch"),
        ({"lr": 0.0}, "lr"),
        ({"clip": -0.1}, "clip"),
        ({"step_fraction": 0.0}, "step_fraction"),
        ({"step_fraction": 1.5}, "step_fraction"),
        ({"kl_loss": math.nan}, "kl_loss"),
        ({"micro_batch": 0}, "micro_batch"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, named):
    with pytest.raises(ConfigError, match=f"{named}.* = "):
        Config(**settings)


def test_more_updates_than_walks_are_refused():
    policy = mlp()
    with pytest.raises(ConfigError, match="updates_per_epoch = 9"):
        Learner(policy, TIMES, Config(updates_per_epoch=9)).update(class_walks(policy, n=8))


def test_the_tail_of_the_ratio_by_hand():
    """r = 2, 1, 1/2: (3.5)^2 / (3 * 5.25) of the transitions count under importance weights."""
    r = torch.tensor([2.0, 1.0, 0.5])
    records = [{"loss": torch.ones(2), "log_ratio": r[:2].log()}, {"loss": torch.ones(1), "log_ratio": r[2:].log()}]
    found = Learner(mlp(), TIMES, Config()).transitions.summary(records, clip=0.2)
    assert found["ess"] == pytest.approx(3.5**2 / (3 * 5.25), rel=1e-6)
    assert found["approx_kl"] == pytest.approx((r - 1 - r.log()).mean().item(), rel=1e-5)
    assert found["clip_fraction"] == pytest.approx(2 / 3)
    assert found["log_ratio_max"] == pytest.approx(math.log(2), rel=1e-6)


def test_walks_join_and_split_by_transition():
    policy = mlp()
    parts = [class_walks(policy, n=n, seed=n) for n in (3, 5)]
    whole = concatenate(parts)
    assert (len(whole), whole.steps) == (8, 4)
    obs, action = whole.transitions(torch.tensor([1, 4, 7]), torch.tensor([0, 3, 2]))
    assert torch.equal(obs.x, torch.stack([parts[0].x[1, 0], parts[1].x[1, 3], parts[1].x[4, 2]]))
    assert torch.equal(action, torch.stack([parts[0].x[1, 1], parts[1].x[1, 4], parts[1].x[4, 3]]))
    assert torch.equal(obs.t, TIMES[[0, 3, 2]])
    assert torch.equal(obs.s, TIMES[[1, 4, 3]])
    assert obs.cond.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"weights \[0, 1\]"):
        concatenate([parts[0], changed(parts[1], version=1)])
    with pytest.raises(ValueError, match="times"):
        concatenate([parts[0], changed(parts[1], times=TIMES / 2)])
