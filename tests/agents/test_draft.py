"""DRaFT: its gradients against closed forms and finite differences, its walks against the workers', its memory."""

import copy
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
    SEED,
    STEPS,
    THETA,
    assert_equal_in_expectation,
    ddim_chain,
    ddim_levels,
    prefixes,
    reward,
    task_of,
)
from rollout_tasks import CLASSES, build, make_recipe

from rlfusion.agents import ddpo
from rlfusion.agents.draft import Config, Ends
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.denoiser import Guided
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import walk
from rlfusion.rewards import JpegCompressibility
from rlfusion.rl.agent import Plan
from rlfusion.rl.reward_gradient import PREFLIGHT, Learner, Part, divergence
from rlfusion.rollout import Task, plan, rollout_noise, run_item, samples
from rlfusion.rollout.trajectory import Trajectory, concatenate


def learner_of(policy: Policy, **settings) -> Learner:
    config = Config(**{"micro_batch": 10**6, "updates_per_epoch": 1} | settings)
    return config.learner(task_of(policy), None, SEED)


def estimate(batches: int, n: int, **settings) -> tuple[np.ndarray, np.ndarray]:
    """The mean gradient of J that ``update`` would ascend, and its standard error, over fresh walks."""
    policy = affine(THETA, **DDIM_V)
    learner = learner_of(policy, **settings)
    learner.optimization = Capture(policy)
    begin = torch.full((n,), learner.config.rollout_spec(STEPS).first)
    for iteration in range(batches):
        learner.update(prefixes(policy, begin, iteration))
    ascent = -torch.stack(learner.optimization.gradients).numpy()
    return ascent.mean(0), ascent.std(0, ddof=1) / math.sqrt(batches)


@pytest.mark.parametrize("trained", [1, 2, 3, 4])
def test_the_gradient_is_the_truncated_derivative(trained):
    settings = {"form": "full"} if trained == STEPS else {"steps": trained}
    enters = np.arange(STEPS) >= STEPS - trained
    assert_equal_in_expectation(
        estimate(20, 2000, **settings), ddim_chain()[0].gradient(np.array(THETA), enters), power=0.02
    )


def test_low_variance_is_the_mean_over_the_end_and_its_renoised_ends():
    whole, (a, b), last = ddim_chain()[0], ddim_levels(), np.arange(STEPS) == STEPS - 1
    again = whole.cut(STEPS, (a[-2], 0.0, b[-2]), (whole.p[-1], whole.q[-1], 0.0))
    first = whole.gradient(np.array(THETA), last)
    more = again.gradient(np.array(THETA), np.arange(STEPS + 2) == STEPS + 1)
    for n in (1, 3):
        truth = (first + n * more) / (1 + n)
        assert_equal_in_expectation(estimate(20, 2000, form="lv", renoisings=n), truth, power=0.02)


def test_low_variance_has_less_variance_than_one_end():
    (_, one), (_, low) = (estimate(60, 100, form=form) for form in ("last", "lv"))
    assert (low < 0.9 * one).all()


def test_the_full_gradient_is_the_finite_difference_with_common_noise():
    policy, n, h = affine(THETA, **DDIM_V), 64, 1e-5
    learner = learner_of(policy, form="full", kl_loss=0.3, kl_std=0.4)
    with torch.no_grad():
        learner.paths.reference.denoiser.net.theta.add_(torch.tensor([0.2, -0.1], dtype=torch.float64))
    learner.optimization = Capture(policy)
    batch = prefixes(policy, torch.zeros(n, dtype=torch.int64))
    learner.update(batch)
    theta = policy.denoiser.net.theta
    for i in range(2):
        values = []
        for shift in (h, -2 * h):
            theta.data[i] += shift
            values.append(penalised(learner, batch))
        theta.data[i] += h
        slope = (values[0] - values[1]) / (2 * h)
        assert learner.optimization.gradients[0][i].item() == pytest.approx(slope, rel=1e-6)


@torch.no_grad()
def penalised(learner: Learner, batch: Trajectory) -> float:
    """The loss by a walk of sampling and KLs by hand."""
    policy, reference = learner.policy, learner.paths.reference
    noise = rollout_noise(SEED, 0, range(len(batch)), STEPS, (2,)).double()
    total = torch.zeros(len(batch), dtype=torch.float64)
    for step in walk(policy, noise, batch.times):
        std = step.transition.std if step.transition.std > 0 else torch.tensor(0.4)
        total += 0.3 * ((step.transition.mean - reference(step.obs).mean) / std).square().sum(1) / 2
    return (total - reward(step.x)).mean().item()


def test_the_divergence_is_the_kl_where_there_is_noise_and_a_distance_where_there_is_none():
    m, ref = torch.randn(5, 3), torch.randn(5, 3)
    s = torch.tensor(0.7)
    torch.testing.assert_close(divergence(Gaussian(m, s), ref, 0.2), Gaussian(m, s).kl(Gaussian(ref, s)))
    expected = (m - ref).square().sum(1) / (2 * 0.2**2)
    torch.testing.assert_close(divergence(Gaussian(m, torch.tensor(0.0)), ref, 0.2), expected)


# The learner's steps are the worker's


def part_of(batch: Trajectory, iteration: int) -> Part:
    return Part(torch.arange(len(batch)), batch.x[:, 0], batch.begin, batch.cond, iteration, 0)


@pytest.mark.parametrize("kernel", [DDIM(1.0), DDIM(0.0)])
@pytest.mark.parametrize(("form", "steps"), [("last", 1), ("last", 3), ("full", 1)])
def test_the_learner_ends_where_the_workers_own_walk_does(kernel, form, steps):
    task, work = build(make_recipe().config, {}), plan(11, 2, 3, 4, 12, CLASSES, 0)[0]
    task = replace(task, policy=Policy(task.policy.denoiser, kernel))
    config = Config(form=form, steps=steps)
    whole = run_item(replace(task, rollout_spec=samples(STEPS)), work)
    begun = run_item(replace(task, rollout_spec=config.rollout_spec(STEPS)), work)
    assert begun.reward is None
    end, _ = Ends(task, config, work.seed).walk(part_of(begun, work.iteration))
    assert torch.equal(end, whole.x[:, 0])


def test_any_rows_in_any_order_have_the_noise_of_their_own_number():
    policy = affine(THETA, **DDIM_V)
    batch = prefixes(policy, torch.full((10,), 1))
    ends, rows = Ends(task_of(policy), Config(steps=3), SEED), torch.tensor([7, 0, 4])
    whole, _ = ends.walk(part_of(batch, 0))
    some, _ = ends.walk(Part(rows, batch.x[rows, 0], batch.begin[rows], None, 0, 5))
    torch.testing.assert_close(some, whole[rows], rtol=1e-12, atol=0)


def test_further_ends_are_drawn_for_each_walk_rollout_and_pass():
    policy = affine(THETA, **DDIM_V)
    batch, ends = prefixes(policy, torch.full((6,), 3)), Ends(task_of(policy), Config(form="lv"), SEED)
    x = batch.x[:, 0]
    (whole, _), (later, _), (again, _) = (
        ends._again(x, part_of(batch, iteration)._replace(epoch=epoch)) for iteration, epoch in ((0, 0), (1, 0), (0, 1))
    )
    some, _ = ends._again(x[[4, 1]], Part(torch.tensor([4, 1]), x[[4, 1]], batch.begin[[4, 1]], None, 0, 0))
    torch.testing.assert_close(some, whole.unflatten(0, (6, 2))[[4, 1]].flatten(0, 1), rtol=1e-12, atol=0)
    assert len(torch.cat([whole, later, again]).unique(dim=0)) == 36


def test_the_kl_of_low_variance_is_the_mean_over_its_ends():
    policy, n = affine(THETA, **DDIM_V), 2
    batch = prefixes(policy, torch.full((6,), 3))
    ends = Ends(task_of(policy), Config(form="lv", renoisings=n, kl_loss=1.0, kl_std=0.4), SEED)
    with torch.no_grad():
        ends.reference.denoiser.net.theta.add_(torch.tensor([0.2, -0.1], dtype=torch.float64))
    part, (a, b) = part_of(batch, 0), (v[-2] for v in ddim_levels())
    x, _ = ends.walk(part)
    again, _ = ends._again(x.detach(), part)
    whole = torch.cat([x[:, None], again.unflatten(0, (6, n))], 1)
    before = (whole + b * THETA[1]) / (a - b * THETA[0])  # the last step is x0 = (a - b theta_0) x - b theta_1
    expected = (b * (0.2 * before - 0.1)).square().sum(2).mean(1) / (2 * 0.4**2)
    torch.testing.assert_close(ends(part).kl, expected, rtol=1e-9, atol=0)


# Recomputed activations


def guided_task(steps: int) -> Task:
    policy = mlp()
    guided = Policy(Guided(policy.denoiser, 1.5, torch.tensor([4])), DDIM(1.0))
    return Task(
        guided, TimeGrid(steps), (1, 3, 2), torch.arange(4), lambda x: x, lambda x, _: x.mean((1, 2, 3)), "mean"
    )


def start(task: Task, n: int = 8) -> Part:
    noise = rollout_noise(SEED, 0, range(n), len(task.times) - 1, task.shape)
    return Part(torch.arange(n), noise[:, 0].clone(), torch.zeros(n, dtype=torch.int64), torch.arange(n) % 4, 0, 0)


@pytest.mark.parametrize("kl_loss", [0.0, 0.1])
def test_recomputing_changes_no_bit_of_the_gradient(kl_loss):
    gradients = []
    for recompute in (True, False):
        task = guided_task(5)
        terms = Ends(task, Config(form="full", kl_loss=kl_loss, recompute=recompute), SEED)(start(task))
        (terms.loss + kl_loss * (terms.kl if kl_loss else 0.0)).sum().backward()
        gradients.append(flat_gradient(task.policy))
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


def saved_bytes(steps: int, recompute: bool | str) -> int:
    """Bytes that a full walk keeps for its backward pass, each tensor once, weights left out."""
    task, kept = guided_task(steps), {}
    weights = {p.untyped_storage().data_ptr() for p in task.policy.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    ends, part = Ends(task, Config(form="full", recompute=recompute), SEED), start(task)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = ends(part)
    assert held.loss.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_a_recomputed_walk_keeps_only_its_states():
    latent = 8 * 6 * 4
    grown = (saved_bytes(20, True) - saved_bytes(10, True)) / 10
    assert grown <= 2 * latent
    assert (saved_bytes(20, False) - saved_bytes(10, False)) / 10 > 10 * latent


@pytest.mark.parametrize(("form", "interval"), [("full", (0.0, 1.0)), ("full", (0.3, 0.7)), ("last", (0.0, 1.0))])
def test_halves_give_the_same_gradient_from_calls_of_half_the_rows(form, interval):
    gradients, kls, calls = [], [], []
    for recompute in (False, "halves"):
        task = guided_task(5)
        task.policy.double()
        task.policy.denoiser.low, task.policy.denoiser.high = interval
        ends = Ends(task, Config(form=form, kl_loss=0.1, recompute=recompute), SEED)
        with torch.no_grad():
            task.policy.denoiser.denoiser.net.register_forward_pre_hook(
                lambda net, given, how=recompute: calls.append((how, len(given[0]), torch.is_grad_enabled()))
            )
            for p in ends.reference.parameters():
                p.mul_(0.9)
        part = start(task)
        terms = ends(part._replace(x=part.x.double()))
        (terms.loss + 0.1 * terms.kl).sum().backward()
        gradients.append(flat_gradient(task.policy))
        kls.append(terms.kl)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*kls, rtol=1e-9, atol=1e-12)
    assert {n for how, n, graph in calls if how == "halves" and graph} == {8}
    assert 16 in {n for how, n, graph in calls if not how and graph}
    assert not task.policy.denoiser.apart


def test_halves_keep_only_states():
    latent = 8 * 6 * 4
    assert (saved_bytes(20, "halves") - saved_bytes(10, "halves")) / 10 <= 4 * latent


def test_halves_need_guidance_by_two_answers():
    with pytest.raises(ConfigError, match=r"recompute = halves: this chain has no guidance.*expected true or false"):
        mlp_learner(recompute="halves")
    with pytest.raises(ConfigError, match=r"recompute = 'half': expected true, false or halves"):
        Config(recompute="half")


@pytest.mark.parametrize("equal", [1, 1.0, 0, 0.0])
def test_a_number_that_equals_true_or_false_is_neither(equal):
    with pytest.raises(ConfigError, match=rf"recompute = {equal}: expected true, false or halves"):
        Config(recompute=equal)


@pytest.mark.parametrize("direction", range(2))
def test_the_gradient_passes_through_guidance(direction):
    task = guided_task(3)
    task.policy.double()
    ends, part = Ends(task, Config(form="full"), SEED), start(task)
    part = part._replace(x=part.x.double())
    draw = torch.Generator().manual_seed(direction)
    v = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in task.policy.parameters()]
    ends(part).loss.sum().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(task.policy.parameters(), v)).item()
    values = []
    for h in (1e-5, -2e-5):
        for p, d in zip(task.policy.parameters(), v):
            p.data.add_(d, alpha=h)
        values.append(ends(part).loss.sum().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


# The learner


def mlp_learner(seed: int = 0, **settings) -> tuple[Learner, Task]:
    policy = mlp(seed)
    task = Task(policy, TimeGrid(4), (1, 3, 2), torch.arange(4), lambda x: x, lambda x, _: x.mean((1, 2, 3)), "mean")
    return Config(**{"updates_per_epoch": 1} | settings).learner(task, None, SEED), task


def rollout(task: Task, config: Config, iteration: int, walks: int = 24) -> Trajectory:
    work = plan(SEED, iteration, 4, walks // 4, 10, 4, 0)
    return concatenate([run_item(replace(task, rollout_spec=config.rollout_spec(4)), item) for item in work])


RICH = {"form": "lv", "epochs": 2, "updates_per_epoch": 3, "kl_loss": 0.05, "ema_decay": 0.9, "micro_batch": 5}


@pytest.mark.parametrize(
    ("settings", "asked"),
    [({}, 24), ({"form": "full", "epochs": 2}, 48), (RICH, 144), ({"form": "lv", "renoisings": 4}, 120)],
)
def test_every_reward_asked_for_is_counted(settings, asked):
    calls = []
    learner, task = mlp_learner(**settings)
    learner.paths.task = replace(task, reward=lambda x, _: calls.append(len(x)) or x.mean((1, 2, 3)))
    metrics = learner.update(rollout(task, learner.config, 0))
    assert learner.queries == sum(calls) == asked
    assert {"reward", "reward_std", "loss", "grad_norm"} <= metrics.keys()
    assert ("kl" in metrics) == bool(settings.get("kl_loss"))
    assert learner.iteration == 1


def test_the_metrics_are_of_the_samples_scored():
    learner, task = mlp_learner(micro_batch=7, lr=1e-9)
    whole = rollout(task, ddpo.Config(), 0)
    metrics = learner.update(rollout(task, learner.config, 0))
    assert metrics["reward"] == pytest.approx(whole.reward.mean().item(), rel=1e-5)
    assert metrics["reward_std"] == pytest.approx(whole.reward.std(correction=0).item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(-metrics["reward"], rel=1e-5)


def test_micro_batches_accumulate_the_gradient_of_one_batch():
    gradients = []
    for micro_batch in (24, 5):
        learner, task = mlp_learner(form="full", micro_batch=micro_batch)
        learner.optimization = Capture(learner.policy)
        learner.update(rollout(task, learner.config, 0))
        gradients.append(learner.optimization.gradients[0])
    most = gradients[0].abs().max().item()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * most)


def test_a_saved_learner_continues_bit_for_bit():
    (straight, task), batches = mlp_learner(**RICH), []
    for i in range(4):
        batches.append(rollout(task, straight.config, i))
        if i < 2:
            straight.update(batches[-1])
    held = io.BytesIO()
    torch.save(straight.state_dict(), held)
    resumed, _ = mlp_learner(seed=99, **RICH)
    held.seek(0)
    resumed.load_state_dict(torch.load(held))
    for batch in batches[2:]:
        assert straight.update(batch) == resumed.update(batch)
    assert straight.queries == resumed.queries == 4 * 144
    for one, other in zip(straight.policy.parameters(), resumed.policy.parameters()):
        assert torch.equal(one, other)


def test_what_a_broken_off_update_left_is_not_in_the_next():
    learner, task = mlp_learner(micro_batch=8)
    twin, _ = mlp_learner(micro_batch=8)
    good = learner.paths.task
    calls = []

    def broken(x, cond):
        calls.append(0)
        return x.mean((1, 2, 3)) * (math.nan if len(calls) == 2 else 1.0)

    batch = rollout(task, learner.config, 0)
    learner.paths.task = replace(good, reward=broken)
    with pytest.raises(NumericalError, match="mean"):
        learner.update(batch)
    learner.paths.task = good
    assert learner.update(batch) == twin.update(batch)


def test_a_walk_far_from_the_reference_pays_for_it():
    ends = []
    for kl_loss in (0.0, 1.0):
        learner, task = mlp_learner(form="full", kl_loss=kl_loss, lr=1e-2)
        for i in range(10):
            metrics = learner.update(rollout(task, learner.config, i))
        ends.append(metrics["reward"])
    assert metrics["kl"] > 0
    assert ends[0] > ends[1] + metrics["reward_std"]


# What cannot work is refused


REFUSED = {
    "jpeg": (JpegCompressibility(), "'jpeg' has no gradient"),
    "flat": (lambda x, _: (x * 0).sum((1, 2, 3)), "'flat' is flat"),
    "detached": (lambda x, _: x.detach().mean((1, 2, 3)), "'detached' has no gradient"),
    "root": (lambda x, _: (x - x.detach()).abs().sqrt().sum((1, 2, 3)), "'root' has a gradient that is not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reward_without_a_usable_gradient_is_refused_when_the_learner_is_built(name):
    reward, said = REFUSED[name]
    task = Task(mlp(), TimeGrid(4), (1, 3, 2), torch.arange(4), lambda x: x, reward, name)
    with pytest.raises(ConfigError, match=said):
        Config().learner(task, None, 0)


def test_the_preflight_finds_a_gradient_and_changes_nothing():
    learner, task = mlp_learner(form="full", kl_loss=0.1)
    batch, before = rollout(task, learner.config, PREFLIGHT), copy.deepcopy(learner.state_dict())
    found = learner.preflight(batch)
    assert found["grad_norm"] > 0
    assert found["reward_std"] > 0
    assert learner.queries == 0
    assert all(p.grad is None for p in learner.policy.parameters())
    for name, value in before["optimization"]["module"].items():
        assert torch.equal(value, learner.policy.state_dict()[name])


def test_the_preflight_refuses_a_gradient_that_reaches_no_weight():
    learner, task = mlp_learner()
    batch = rollout(task, learner.config, PREFLIGHT)
    learner.paths.task = replace(task, reward=lambda x, _: x.clamp(50, 60).mean((1, 2, 3)))
    with pytest.raises(ConfigError, match=r"reward 'mean'.* 0 in every weight"):
        learner.preflight(batch)
    learner.paths.task = replace(task, reward=lambda x, _: (x - x.detach()).abs().sqrt().mean((1, 2, 3)))
    with pytest.raises(NumericalError, match="not finite"):
        learner.preflight(batch)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"form": "full", "steps": 2}, "steps"),
        ({"form": "lv", "renoisings": 0}, "renoisings"),
        ({"lr": 0.0}, "lr"),
        ({"epochs": 0}, "epochs"),
        ({"kl_std": 0.0}, "kl_std"),
        ({"kl_loss": -1.0}, "kl_loss"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, named):
    with pytest.raises(ConfigError, match=f"{named} = "):
        Config(**settings)


def test_plans_that_cannot_work_are_named():
    Config(steps=4, updates_per_epoch=12).check(Plan(3, 4, 1, 4))
    with pytest.raises(ConfigError, match="steps = 5: expected at most the 4"):
        Config(steps=5).check(Plan(3, 4, 0, 4))
    with pytest.raises(ConfigError, match="updates_per_epoch = 13: expected at most the 12"):
        Config(updates_per_epoch=13).check(Plan(3, 4, 0, 4))
    assert "6 update(s) through the last 2" in Config(epochs=2, updates_per_epoch=3, steps=2).plan()
    assert "3 reward(s) a walk" in Config(form="lv").plan()


# It learns


@pytest.mark.parametrize("settings", [{"form": "full"}, {"steps": 2}, {"form": "lv"}])
def test_it_moves_a_mixture_to_the_rewarded_mode_and_the_kl_keeps_its_spread(settings):
    assert_learns(*(Config(lr=3e-3, updates_per_epoch=1, kl_loss=kl, kl_std=STD, **settings) for kl in (0.0, 0.03)))
