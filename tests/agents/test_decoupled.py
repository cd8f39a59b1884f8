"""Walks of older weights: the decoupled objective against closed forms and finite differences, its bound, its guard."""

import numpy as np
import pytest
import torch
from chains import Capture, affine, all_transitions, collect
from ddpo_walks import PLAIN, estimate, walks_of_other_weights
from quadratic import CHAINS, STEPS, THETA, assert_equal_in_expectation, ddim_chain, reward

from rlfusion.agents import AGENTS, ddpo, grpo
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.objectives import behaviour_weight, effective_share
from rlfusion.rl.agent import Plan

OLD, PROXIMAL, NOW = THETA, [t + 0.3 for t in THETA], [t + 0.4 for t in THETA]
LIMIT, CLIP, DUAL = 1.2, 0.1, 1.2
MODULES = {"ddpo": ddpo, "grpo": grpo}
ONE = {"epochs": 1, "updates_per_epoch": 1, "kl_loss": 0.0, "micro_batch": 10**6}


def stale(n: int = 64):
    """(walks of old weights, the settings of their chain)."""
    _, made = ddim_chain()
    noise = torch.randn(n, STEPS + 1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return collect(affine(OLD, **made), TimeGrid(STEPS).times(made["schedule"]), noise, reward), made


def log_probs(batch, made, theta) -> np.ndarray:
    """log p of the transitions (B, K) that have noise, of the chain written out."""
    policy = affine(theta, **made)
    walk, step = all_transitions(batch)
    obs, action = batch.transitions(walk, step)
    with torch.no_grad():
        return policy(obs).log_prob(action).reshape(len(batch), -1).numpy()


def value(batch, made, theta, advantage: np.ndarray) -> float:
    """The decoupled objective by arithmetic: the mean over walks of the sum over steps of w min(r A, clip(r) A)."""
    old, proximal, now = (log_probs(batch, made, t) for t in (OLD, PROXIMAL, theta))
    weight = np.minimum(np.exp(proximal - old), LIMIT)
    ratio, a = np.exp(now - proximal), advantage[:, None]
    clipped = np.minimum(ratio * a, np.clip(ratio, 1 - CLIP, 1 + CLIP) * a)
    return float((weight * np.where(a < 0, np.maximum(clipped, DUAL * a), clipped)).sum(1).mean())


def test_the_gradient_is_the_finite_difference_of_the_objective_in_float64():
    batch, made = stale()
    config = ddpo.Config(**PLAIN | {"advantage": "batch"}, clip=CLIP, dual_clip=DUAL, behaviour_limit=LIMIT)
    policy = affine(PROXIMAL, **made)
    learner = ddpo.Learner(policy, batch.times, config)
    learner.iteration = 1  # the walks are of version 0
    proximal, advantage = learner._proximal(batch), learner.advantages(batch.reward, batch.group)
    with torch.no_grad():
        for parameter, now in zip(policy.parameters(), affine(NOW, **made).parameters()):
            parameter.copy_(now)
    walks = torch.arange(len(batch))
    objective = learner._objective(batch, advantage, proximal, walks)
    learner.transitions.accumulate(batch, *learner.transitions.all(walks), objective)
    found = -torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).numpy()
    h, a = 1e-6, advantage.numpy()
    expected = [(value(batch, made, NOW + h * e, a) - value(batch, made, NOW - h * e, a)) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    weights = np.exp(log_probs(batch, made, PROXIMAL) - log_probs(batch, made, OLD))
    assert (weights > LIMIT).any()
    assert (weights < LIMIT).any()  # the limit is at work, and not everywhere


@pytest.mark.parametrize("chain", CHAINS)
def test_the_weights_of_older_walks_give_the_gradient_at_the_present_ones(chain):
    """In expectation, without a bound: the closed form of the steps' own importance weights."""
    chain, made = CHAINS[chain]()
    config = ddpo.Config(**PLAIN, decoupled=True, clip=1e-3, dual_clip=None, behaviour_limit=1e9)
    truth = chain.gradient(np.array(PROXIMAL), chain.noisy, old=np.array(OLD))
    assert_equal_in_expectation(estimate(made, config, acting=OLD, at=PROXIMAL), truth)


def test_weights_are_bounded_and_pass_no_gradient():
    log_weight = torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    weight = behaviour_weight(log_weight, 5.0)
    torch.testing.assert_close(weight, torch.tensor([np.exp(-1.0), 1.0, 5.0], dtype=torch.float64))
    assert not weight.requires_grad


def test_the_effective_share_by_hand():
    assert effective_share(torch.zeros(7)).item() == 1
    assert effective_share(torch.tensor([0.0, -1e9])).item() == pytest.approx(0.5)
    assert effective_share(torch.log(torch.tensor([1.0, 3.0]))).item() == pytest.approx(16 / (2 * 10))
    assert effective_share(torch.tensor([800.0, 800.0])).item() == pytest.approx(1)  # no overflow


def gradient(module, batch, policy, iteration: int, **settings) -> tuple[torch.Tensor, dict[str, float]]:
    learner = module.Learner(policy, batch.times, module.Config(**ONE, **settings))
    learner.optimization, learner.iteration = Capture(policy), iteration
    metrics = learner.update(batch)
    return learner.optimization.gradients[0], metrics


@pytest.mark.parametrize("ratio", ["step", "trajectory", "grpo"])
def test_the_clip_fraction_is_that_of_the_ratio_to_the_weights_where_the_update_begins(ratio):
    """After one step of two: p / p_prox of steps, or of whole walks; p / p_old is another one."""
    batch, made = stale()
    old, proximal, now = (log_probs(batch, made, t) for t in (OLD, PROXIMAL, NOW))
    settings = {"clip": CLIP, "advantage": "batch", "ratio": ratio}
    settings = {"clip_low": CLIP, "clip_high": CLIP} if ratio == "grpo" else settings
    module = grpo if ratio == "grpo" else ddpo
    policy = affine(PROXIMAL, **made)
    learner = module.Learner(policy, batch.times, module.Config(**ONE, **settings, decoupled=True))
    learner.iteration, walks = 1, torch.arange(len(batch))
    advantage = learner.advantages(batch.reward, batch.group)
    if ratio == "grpo":
        held = learner._proximal(batch, learner.transitions)
    else:
        held = learner._proximal(batch)
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), affine(NOW, **made).parameters()):
            parameter.copy_(value)
    last = (learner.transitions, advantage, held) if ratio == "grpo" else (advantage, held, walks)
    objective = learner._objective(batch, *last)
    records = learner.transitions.accumulate(batch, *learner.transitions.all(walks), objective)
    log_ratio = now - proximal
    wanted = log_ratio.sum(1) if ratio == "trajectory" else log_ratio
    plain = (now - old).sum(1) if ratio == "trajectory" else now - old
    found = learner.transitions.summary(records, CLIP)["clip_fraction"]
    assert found == pytest.approx((np.abs(np.exp(wanted) - 1) > CLIP).mean(), abs=1e-6)
    assert found != pytest.approx((np.abs(np.exp(plain) - 1) > CLIP).mean(), abs=1e-3)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_older_walks_are_weighed_by_themselves_and_on_policy_no_bit_moves(module):
    policy, batch = walks_of_other_weights()
    assert batch.version == 0
    first, metrics = gradient(module, batch, policy, 0)
    assert torch.equal(first, gradient(module, batch, policy, 0, decoupled=False)[0])
    assert "behaviour_ess" not in metrics
    later, metrics = gradient(module, batch, policy, 1)
    assert torch.equal(later, gradient(module, batch, policy, 1, decoupled=True)[0])
    assert not torch.equal(later, first)
    assert 0 < metrics["behaviour_ess"] < 1
    assert "behaviour_ess" not in gradient(module, batch, policy, 1, decoupled=False)[1]


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_the_effective_share_is_that_of_the_weights(module):
    policy, batch = walks_of_other_weights()
    learner = module.Learner(policy, batch.times, module.Config(**ONE))
    log_weight = learner.transitions.log_ratio(batch, *all_transitions(batch)).detach()
    _, metrics = gradient(module, batch, policy, 1)
    assert metrics["behaviour_ess"] == pytest.approx(effective_share(log_weight).item(), rel=1e-6)


def test_grpo_and_ddpo_weigh_alike():
    policy, batch = walks_of_other_weights()
    mine, _ = gradient(grpo, batch, policy, 1, behaviour_limit=1.2)
    theirs, _ = gradient(ddpo, batch, policy, 1, behaviour_limit=1.2)
    torch.testing.assert_close(mine, theirs)
    assert not torch.allclose(mine, gradient(grpo, batch, policy, 1, behaviour_limit=100.0)[0])


def test_whole_walks_have_one_bounded_weight():
    policy, batch = walks_of_other_weights()
    whole = {"ratio": "trajectory", "clip": 1e-6, "dual_clip": None}
    learner = ddpo.Learner(policy, batch.times, ddpo.Config(**ONE, **whole, decoupled=True, behaviour_limit=1.01))
    log_weight = learner._proximal(batch).sum(1)
    found, metrics = gradient(ddpo, batch, policy, 1, **whole, behaviour_limit=1.01)
    assert metrics["behaviour_ess"] == pytest.approx(effective_share(log_weight).item())
    free, _ = gradient(ddpo, batch, policy, 1, **whole, behaviour_limit=1e9)
    assert (log_weight.exp() > 1.01).any()
    assert not torch.allclose(found, free)


LAGGING = {
    "ddpo": "", "grpo": "", "dpo": "", "sft": "", "qsm": "",
    "draft(form='full')": "", "drwr(on='chain')": "", "dawr(on='noised')": "",
    "ddpo(form='sf')": "form 'sf' is on-policy", "nft": "agent 'nft'", "refl": "agent 'refl'", "draft": "agent 'draft'",
    "awm": "agent 'awm'", "ppo": "agent 'ppo'", "opd": "agent 'opd'", "drwr": "on 'centred'", "dawr": "on 'centred'",
}  # fmt: skip
"""What each agent says of a lag: nothing, or why it takes none."""


@pytest.mark.parametrize("agent", LAGGING)
def test_an_agent_takes_older_walks_or_refuses_them_by_name(agent):
    settings = spec.parse(agent, AGENTS, AGENTS.what)
    plan = dict(prompts=10, samples_per_prompt=24, steps=20)
    settings.check(Plan(**plan, lag=0))
    if not LAGGING[agent]:
        settings.check(Plan(**plan, lag=4))
        return
    with pytest.raises(ConfigError, match=f"lag = 4: .*{LAGGING[agent]}.*expected 0"):
        settings.check(Plan(**plan, lag=4))


def test_every_agent_is_asked():
    assert {text.partition("(")[0] for text in LAGGING} == set(AGENTS.names())


def test_a_limit_that_is_none_is_refused():
    for module in MODULES.values():
        with pytest.raises(ConfigError, match="behaviour_limit = 0"):
            module.Config(behaviour_limit=0)
