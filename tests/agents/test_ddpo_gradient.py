"""DDPO's gradient against closed forms of the linear-Gaussian chain, finite differences and arithmetic by hand."""

import math

import numpy as np
import pytest
import torch
from chains import Capture, affine, all_transitions, class_walks, collect, flat_gradient, mlp
from ddpo_walks import PLAIN, estimate, walks_of_other_weights
from quadratic import CHAINS, STEPS, THETA, assert_equal_in_expectation, ddim_chain, flow_chain, reward, task_of

from rlfusion.agents.ddpo import Config, Learner
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import Renoise
from rlfusion.diffusion.sampling import walk
from rlfusion.diffusion.schedule import DDPM as Table
from rlfusion.diffusion.schedule import Geometric
from rlfusion.rl.pathwise import PathwiseStep


@pytest.mark.parametrize("chain", CHAINS)
def test_the_oracle_is_the_derivative_of_its_value(chain):
    chain, _ = CHAINS[chain]()
    h, theta = 1e-6, np.array(THETA)
    difference = [(chain.value(theta + h * e) - chain.value(theta - h * e)) / (2 * h) for e in np.eye(2)]
    everywhere = np.ones(STEPS, bool)
    np.testing.assert_allclose(chain.gradient(theta, everywhere), difference, rtol=1e-7)
    parts = chain.gradient(theta, chain.noisy) + chain.gradient(theta, ~chain.noisy)
    np.testing.assert_allclose(parts, difference, rtol=1e-7)
    np.testing.assert_allclose(chain.gradient(theta, chain.noisy, old=theta), chain.gradient(theta, chain.noisy))
    assert chain.noisy.tolist() == [True] * 3 + [False]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("form", ["sf", "is"])
def test_expectation_is_the_closed_form(chain, form):
    """The gradient through the noisy steps: with its sign, and without the pathwise part of the last step."""
    chain, made = CHAINS[chain]()
    truth = chain.gradient(np.array(THETA), chain.noisy)
    assert_equal_in_expectation(estimate(made, Config(form=form, **PLAIN)), truth)


def test_a_random_share_of_the_steps_is_unbiased():
    chain, made = ddim_chain()
    truth = chain.gradient(np.array(THETA), chain.noisy)
    assert_equal_in_expectation(estimate(made, Config(form="sf", step_fraction=1 / 3, **PLAIN), batches=80), truth)


@pytest.mark.parametrize("chain", CHAINS)
def test_importance_weights_correct_each_step(chain):
    """On walks of other weights: the per-step expectation, which is not the on-policy gradient."""
    chain, made = CHAINS[chain]()
    at = (-0.24, 0.31)
    truth = chain.gradient(np.array(at), chain.noisy, old=np.array(THETA))
    got = estimate(made, Config(clip=1e9, dual_clip=None, **PLAIN), at=at, batches=80)
    assert_equal_in_expectation(got, truth)
    assert (np.abs(got[0] - chain.gradient(np.array(at), chain.noisy)) > 4 * got[1]).any()


@pytest.mark.parametrize("chain", CHAINS)
def test_the_ratio_of_whole_walks_is_exact_away_from_the_acting_weights(chain):
    """The gradient at other weights in every noisy step; the last step, which the walks took, stays as it was."""
    chain, made = CHAINS[chain]()
    at = (-0.22, 0.33)
    acting = np.array([at] * (STEPS - 1) + [THETA])
    truth = chain._derivative(acting, chain.noisy)
    config = Config(clip=1e9, dual_clip=None, ratio="trajectory", **PLAIN)
    assert_equal_in_expectation(estimate(made, config, at=at, batches=200), truth)


def test_the_ratio_of_each_step_is_not():
    chain, made = flow_chain()
    at = (-0.22, 0.33)
    truth = chain._derivative(np.array([at] * (STEPS - 1) + [THETA]), chain.noisy)
    mean, error = estimate(made, Config(clip=1e9, dual_clip=None, **PLAIN), at=at, batches=200)
    assert (np.abs(mean - truth) > 4 * error).any()


@pytest.mark.parametrize("chain", CHAINS)
def test_the_last_step_completes_the_gradient(chain):
    chain, made = CHAINS[chain]()
    config = Config(form="sf", last_step="pathwise", **PLAIN)
    truth = chain.gradient(np.array(THETA), np.ones(STEPS, bool))
    got = estimate(made, config, last=True)
    assert_equal_in_expectation(got, truth)
    assert (np.abs(got[0] - chain.gradient(np.array(THETA), chain.noisy)) > 4 * got[1]).any()


@pytest.mark.parametrize("advantage", ["group", "batch"])
def test_the_last_step_is_in_units_of_the_advantage(advantage):
    """Rewards ten times as large are the same update."""
    policy, noise = affine(THETA, **ddim_chain()[1]), torch.randn(40, STEPS + 1, 2, dtype=torch.float64)
    settings = {**PLAIN, "advantage": advantage, "form": "sf", "last_step": "pathwise", "advantage_clip": 1e9}
    gradients = []
    for scale in (1.0, 10.0):

        def score(x, scale=scale):
            return scale * reward(x)

        batch = collect(policy, TimeGrid(STEPS).times(policy.schedule), noise, score)
        learner = Learner(policy, batch.times, Config(**settings), 0, PathwiseStep(task_of(policy, score)))
        learner.optimization = Capture(policy)
        learner.update(batch)
        gradients += learner.optimization.gradients
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


def test_a_last_step_that_cannot_be_differentiated_is_refused():
    policy = affine(THETA, **ddim_chain()[1])
    with pytest.raises(ConfigError, match="'quadratic' has no gradient"):
        PathwiseStep(task_of(policy, lambda x: reward(x).detach()))
    with pytest.raises(ConfigError, match="has noise"):
        PathwiseStep(task_of(affine(THETA, Geometric(), Renoise(), "x0")))


def test_the_decoupled_clip_holds_to_the_weights_where_the_update_begins():
    """There the ratio to p_prox is 1: nothing is clipped, and the gradient is that of unclipped importance sampling."""
    policy, batch = walks_of_other_weights()
    free = update_gradient(batch, Config(clip=1e9, dual_clip=None, **PLAIN), policy)
    settings = {"clip": 1e-6, "dual_clip": None, **PLAIN}
    torch.testing.assert_close(update_gradient(batch, Config(decoupled=True, **settings), policy), free)
    assert not torch.allclose(update_gradient(batch, Config(**settings), policy), free, rtol=1e-2)


def test_the_decoupled_ratio_of_whole_walks():
    policy, batch = walks_of_other_weights()
    free = update_gradient(batch, Config(clip=1e9, dual_clip=None, ratio="trajectory", **PLAIN), policy)
    settings = {"clip": 1e-6, "dual_clip": None, "ratio": "trajectory", **PLAIN}
    torch.testing.assert_close(update_gradient(batch, Config(decoupled=True, **settings), policy), free)


def update_gradient(batch, config: Config, policy, reference=None) -> torch.Tensor:
    """The gradient of ``update``'s loss; the reference, where there is one, is ``reference`` instead of the start."""
    learner = Learner(policy, batch.times, config)
    if reference is not None:
        learner.transitions.reference.load_state_dict(reference.state_dict())
    learner.optimization = Capture(policy)
    learner.update(batch)
    return learner.optimization.gradients[0]


def test_both_forms_agree_at_the_acting_weights():
    policy = mlp().double()
    batch = class_walks(policy)
    sf, is_ = (update_gradient(batch, Config(form=form, **PLAIN), policy) for form in ("sf", "is"))
    torch.testing.assert_close(sf, is_, rtol=1e-6, atol=1e-9)
    walk, step = all_transitions(batch)
    ratio = Learner(policy, batch.times, Config()).transitions.log_ratio(batch, walk, step)
    assert ratio.abs().max() < 1e-5


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_accumulation_does_not_change_the_gradient(micro_batch):
    policy, reference = mlp().double(), mlp(1).double()
    batch, settings = class_walks(policy), {**PLAIN, "kl_loss": 0.1, "kl_reward": 0.1}
    whole, parts = (
        update_gradient(batch, Config(**settings | {"micro_batch": m}), policy, reference) for m in (10**6, micro_batch)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def one_transition(delta: float):
    """A policy of 2 features and walks whose log-ratio is ``delta`` at every noisy step; reward 1."""
    _, made = ddim_chain()
    policy, g = affine(THETA, **made), torch.Generator().manual_seed(3)
    times = TimeGrid(STEPS).times(Table())
    noise = torch.randn(5, STEPS + 1, 2, generator=g, dtype=torch.float64)
    batch = collect(policy, times, noise, lambda x: torch.ones(5).double())
    return policy, type(batch)(**vars(batch) | {"log_prob": batch.log_prob - delta})


@pytest.mark.parametrize(("per_dim", "factor"), [(False, 0.0), (True, math.exp(0.15) / 2)])
def test_the_clip_per_dimension(per_dim, factor):
    """log r = .3 over 2 features: e^.3 > 1.2 is clipped (gradient 0); e^.15 < 1.2 is not, and weighs grad log p / 2."""
    policy, batch = one_transition(0.3)
    score = update_gradient(batch, Config(form="sf", **PLAIN), policy)
    got = update_gradient(batch, Config(clip=0.2, dual_clip=None, clip_per_dim=per_dim, **PLAIN), policy)
    torch.testing.assert_close(got, factor * score, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("sign", "clipped"), [(1.0, True), (-1.0, False)])
def test_the_clip_is_pessimistic(sign, clipped):
    """Above the range a positive advantage stops pushing; a negative one still pulls back, with weight r."""
    policy, batch = one_transition(0.3)
    batch = type(batch)(**vars(batch) | {"reward": sign * batch.reward})
    score = update_gradient(batch, Config(form="sf", **PLAIN), policy)
    got = update_gradient(batch, Config(clip=0.2, dual_clip=None, **PLAIN), policy)
    torch.testing.assert_close(got, (0.0 if clipped else math.exp(0.3)) * score, rtol=1e-9, atol=1e-12)


def walk_kl(theta: np.ndarray, reference: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sum_k |m_theta - m_ref|^2 / (2 S_k^2) at the states x (B, K+1, d) of the chain, (B,)."""
    chain, _ = ddim_chain()
    move = theta - reference
    gap = [q * (move[0] * x[:, k] + move[1]) for k, q in enumerate(chain.q)]
    return sum((g**2).sum(1) / (2 * s**2) for g, s in zip(gap, chain.std) if s > 0)


REFERENCE = (-0.1, 0.4)


def test_the_gradient_of_the_kl_loss_is_its_finite_difference():
    policy, batch = one_transition(0.0)
    batch = type(batch)(**vars(batch) | {"reward": 0 * batch.reward})
    reference = affine(REFERENCE, **ddim_chain()[1])
    got = update_gradient(batch, Config(**PLAIN | {"kl_loss": 0.7}), policy, reference)
    h, x = 1e-6, batch.x.numpy()

    def kl(theta):
        return 0.7 * walk_kl(theta, np.array(REFERENCE), x).mean()

    difference = [(kl(np.array(THETA) + h * e) - kl(np.array(THETA) - h * e)) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(got, difference, rtol=1e-6)


def path_kl_gradient(made: dict, n: int = 400_000) -> np.ndarray:
    """The gradient of E sum_t KL(p_theta || p_ref) over the walks of theta: pathwise, so states depend on theta too."""
    policy, reference = affine(THETA, **made), affine(REFERENCE, **made)
    noise = torch.randn(n, STEPS + 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = torch.zeros(n, dtype=torch.float64)
    for step in walk(policy, noise, TimeGrid(STEPS).times(made["schedule"])):
        if bool((step.transition.std > 0).all()):
            total = total + step.transition.kl(reference(step.obs))
    total.mean().backward()
    return flat_gradient(policy).numpy()


def test_the_kl_in_the_reward_has_the_gradient_of_the_kl_of_the_walks():
    made = ddim_chain()[1]
    policy, times = affine(THETA, **made), TimeGrid(STEPS).times(made["schedule"])
    learner = Learner(policy, times, Config(form="sf", kl_reward=1.0, **PLAIN))
    learner.transitions.reference.load_state_dict(affine(REFERENCE, **made).state_dict())
    learner.optimization, g = Capture(policy), torch.Generator().manual_seed(0)
    for _ in range(60):
        noise = torch.randn(8000, STEPS + 1, 2, generator=g, dtype=torch.float64)
        learner.update(collect(policy, times, noise, lambda x: torch.zeros(len(x), dtype=torch.float64)))
    descent = torch.stack(learner.optimization.gradients).numpy()
    error = descent.std(0, ddof=1) / math.sqrt(len(descent))
    assert_equal_in_expectation((descent.mean(0), error), path_kl_gradient(made))


def test_states_and_actions_are_constants():
    """The gradient is that of sum log p with x_t and x_s detached (erratum 81), by plain autograd."""
    policy, batch = one_transition(0.0)
    walk, step = all_transitions(batch)
    obs, action = batch.transitions(walk, step)
    policy.zero_grad()
    (-policy(obs).log_prob(action).sum() / len(batch)).backward()
    by_hand = flat_gradient(policy)
    policy.zero_grad()
    torch.testing.assert_close(update_gradient(batch, Config(form="sf", **PLAIN), policy), by_hand)
