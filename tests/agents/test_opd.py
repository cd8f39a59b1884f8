"""On-policy distillation: its gradient by hand, the teacher's law reached on a mixture, guidance taught, resuming."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import Capture, affine, class_walks, collect, mlp
from mixtures import Exact
from outsides import Beside
from plane import MODES, STD, ends, fraction_near, plane_task, rewarded
from quadratic import CHAINS, DDIM_V, THETA, task_of
from quadratic import STEPS as SHORT
from quadratic import reward as quadratic
from weighted import plain_task, same

from rlfusion.agents.opd import Config
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.rl.agent import Plan

ONE = {"epochs": 1, "updates_per_epoch": 1, "micro_batch": 10**6}
AIM = (-0.1, 0.4)


class To:
    """An ``Outside`` of one teacher."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy.requires_grad_(False)

    def teacher(self, model: str, guidance: float | None) -> Policy:
        return self.policy


def learner_of(policy=None, seed: int = 0, **settings):
    policy = policy or mlp()
    task = replace(plain_task(policy, (1, 3, 2), 4), outside=Beside(mlp(3)))
    return Config(**settings).learner(task, None, seed)


@pytest.mark.parametrize(
    "settings",
    [{}, {"step_weight": "noise"}, {"kl_std": 0.3}, {"kl_std": 0.3, "step_weight": "noise", "micro_batch": 7}],
)
@pytest.mark.parametrize("name", CHAINS)
def test_the_gradient_is_that_by_hand_with_the_states_held(name, settings):
    """m - m' = q (d_0 x + d_1) with d = theta - theta', so that dD / dtheta = q^2 / S^2 (d_0 x + d_1) (x, 1)."""
    chain, made = CHAINS[name]()
    policy = affine(THETA, **made)
    learner = Config(**ONE | settings).learner(replace(task_of(policy), outside=To(affine(AIM, **made))), None, 0)
    learner.optimization = Capture(policy)
    noise = torch.randn(50, SHORT + 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = collect(policy, replace(task_of(policy)).times, noise, quadratic)
    metrics = learner.update(batch)
    std = np.where(chain.std == 0, settings.get("kl_std", 0.0), chain.std)
    kept = std > 0
    assert kept.sum() == (4 if "kl_std" in settings else 3)
    weight = std / std[kept].mean() if settings.get("step_weight") else np.ones(len(std))
    d, x = np.array(THETA) - np.array(AIM), batch.x[:, :-1].numpy()
    gap = d[0] * x + d[1]
    scale = np.divide(chain.q**2, std**2, out=np.zeros(len(std)), where=kept)[:, None]
    by_hand = [(weight[:, None] * scale * gap * part).sum((1, 2)).mean() for part in (x, 1)]
    np.testing.assert_allclose(learner.optimization.gradients[0].numpy(), by_hand, rtol=1e-6)
    assert metrics["kl"] == pytest.approx((scale * gap**2 / 2).sum((1, 2)).mean(), rel=1e-6)


def test_the_student_comes_to_walk_as_the_teacher_does():
    """A mixture of two equal modes becomes that of the teacher, whose right-hand mode has a fifth of the mass."""
    taught = Exact(Cosine(), "v", weight=(0.8, 0.2), mean=MODES.tolist(), var=(STD**2, STD**2))
    task, teacher = plane_task(), Policy(taught, DDIM(1.0))
    assert fraction_near(task) > 0.35
    settings = {"lr": 3e-3, "ema_decay": 0.0, "step_weight": "noise", "kl_std": 0.05}
    rewarded(replace(task, outside=To(teacher)), Config(**settings), updates=25)
    theirs = replace(task, policy=teacher)
    assert fraction_near(theirs) < 0.2
    assert abs(fraction_near(task) - fraction_near(theirs)) < 0.03
    assert (ends(task) - ends(theirs)).norm(dim=1).mean() < 0.05, "walks of the same noise end alike"


def test_a_deterministic_chain_has_no_kl_and_a_std_of_its_own_makes_it_a_regression():
    policy = affine(THETA, **DDIM_V | {"kernel": DDIM(0.0)})
    task = replace(task_of(policy), outside=To(affine(AIM, **DDIM_V | {"kernel": DDIM(0.0)})))
    with pytest.raises(ConfigError, match=r"DDIM\(eta=0.0\) has no noise at any of the 4 steps, so no KL.*kl_std > 0"):
        Config().learner(task, None, 0)
    learner = Config(kl_std=0.1, lr=0.1, ema_decay=0.0).learner(task, None, 0)
    noise = torch.randn(16, SHORT + 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(25):
        learner.update(collect(policy, task.times, noise, quadratic))
    np.testing.assert_allclose(policy.denoiser.net.theta.detach().numpy(), AIM, atol=0.02)


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 11, "epochs": 2, "step_weight": "noise", "kl_std": 0.1}])
def test_a_saved_learner_continues_bit_for_bit(settings):
    batches = [class_walks(mlp(), seed=i) for i in range(4)]
    straight, resumed = (learner_of(mlp(seed), 5, **settings) for seed in (0, 9))
    for batch in batches[:2]:
        straight.update(batch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    assert same(straight.policy, resumed.policy)
    assert straight.queries == resumed.queries == 4 * 24


def test_it_learns_nothing_from_rewards_and_refuses_what_is_not_finite():
    weights = []
    for reward in (0.0, 5.0):
        policy, batch = mlp(), class_walks(mlp())
        metrics = learner_of(policy).update(replace(batch, reward=torch.full_like(batch.reward, reward)))
        assert metrics["reward"] == reward
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*weights)
    batch.reward[3] = torch.nan
    with pytest.raises(NumericalError, match=r"\[3\]"):
        learner_of().update(batch)


def test_a_teacher_that_is_the_student_is_refused_before_any_update():
    policy = mlp()
    learner = Config().learner(replace(plain_task(policy, (1, 3, 2), 4), outside=To(copy.deepcopy(policy))), None, 0)
    with pytest.raises(ConfigError, match="takes the student's own steps"):
        learner.preflight(class_walks(policy))
    other = learner_of()
    assert other.preflight(class_walks(mlp()))["kl"] > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(lr=0), "lr = 0"),
        (lambda: Config(kl_std=-1), "kl_std = -1"),
        (lambda: Config(teacher_guidance=float("inf")), "teacher_guidance = inf"),
        (lambda: Config().check(Plan(1, 3, 0, 20)), "updates_per_epoch = 4"),
        (lambda: Config().check(Plan(10, 24, 2, 20)), "lag = 2: agent 'opd'"),
        (lambda: Config("opd", "x").learner(plain_task(mlp(), (1, 3, 2), 4), None, 0), "teacher = 'x': this task"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_plan_names_the_teacher():
    assert "the model that it begins with under guidance 3" in Config(teacher_guidance=3.0).plan()
    assert "the steps of runs/x;" in Config(teacher="runs/x").plan()
