"""Work items and the in-process backend."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from counted import counting
from rollout_tasks import CLASSES, SHAPE, assert_identical, build, make_policy, make_recipe
from rounding import ROUNDING

from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import Weights, WeightsError
from rlfusion.data import to_pixels
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.sampling import chain_noise, sample
from rlfusion.rewards import RewardError
from rlfusion.rollout import Local, Recipe, Settings, WorkItem, make_backend, plan, prefix, run_item, version_for
from rlfusion.rollout.item import choose_prompts, noises
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.rollout.wire import from_wire, to_wire


def small_plan(item_size: int = 4, iteration: int = 2, version: int = 5) -> list[WorkItem]:
    return plan(11, iteration, 3, 4, item_size, CLASSES, version)


def test_a_plan_covers_every_sample_once_prompt_by_prompt():
    items = plan(seed=1, iteration=3, prompts_per_step=4, samples_per_prompt=6, item_size=5, prompts_total=9, version=2)
    assert [len(item) for item in items] == [5, 5, 5, 5, 4]
    assert [sample for item in items for sample in item.samples] == list(range(24))
    groups = [group for item in items for group in item.groups]
    assert groups == [g for g in groups[::6] for _ in range(6)]
    assert len(set(groups)) == 4
    assert [item.index for item in items] == list(range(5))
    assert {(item.seed, item.iteration, item.version) for item in items} == {(1, 3, 2)}


def test_the_item_size_changes_neither_prompts_nor_sample_numbers():
    flat = [[(n, g) for item in small_plan(size) for n, g in zip(item.samples, item.groups)] for size in (1, 5, 12, 99)]
    assert flat[0] == flat[1] == flat[2] == flat[3]


def test_prompts_are_without_replacement_while_they_last_and_differ_by_iteration():
    assert sorted(choose_prompts(0, 0, 10, 10)) == list(range(10))
    assert sorted(choose_prompts(0, 0, 25, 10)[:20]) == sorted([*range(10)] * 2)
    draws = [tuple(choose_prompts(0, i, 3, 10)) for i in range(300)]
    assert len(set(draws)) > 200
    counts = torch.tensor(draws).flatten().bincount(minlength=10)
    assert 60 < counts.min() <= counts.max() < 120  # 90 expected, standard deviation 8
    assert choose_prompts(1, 0, 10, 10) != choose_prompts(0, 0, 10, 10)


@pytest.mark.parametrize("name", ["prompts_per_step", "samples_per_prompt", "item_size", "prompts_total"])
def test_a_size_below_one_is_refused_by_name(name):
    sizes = {"prompts_per_step": 1, "samples_per_prompt": 1, "item_size": 1, "prompts_total": 1} | {name: 0}
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        plan(seed=0, iteration=0, version=0, **sizes)


def test_an_item_is_json():
    item = small_plan()[1]
    assert WorkItem.from_json(json.loads(json.dumps(item.to_json()))) == item
    assert str(item) == "item 1 of iteration 2 (samples 4..7, weights 5)"


def test_version_for_by_hand():
    assert [version_for(s, 0, 4) for s in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [version_for(s, 1, 4) for s in range(10)] == [0, 0, 1, 2, 4, 4, 5, 6, 8, 8]
    assert [version_for(s, 3, 4) for s in range(10)] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert [version_for(s, 2, 0) for s in range(5)] == [0, 0, 0, 1, 2]
    with pytest.raises(ConfigError, match="lag = -1"):
        version_for(1, -1, 1)


def test_version_for_needs_no_weights_from_before_the_checkpoint_and_bounds_the_lag():
    for every in range(1, 7):
        for lag in range(5):
            for step in range(40):
                version = version_for(step, lag, every)
                assert step - lag <= version <= step
                assert version >= step // every * every
                assert version <= version_for(step + 1, lag, every)


def test_a_rollout_is_the_chain_of_the_sampler_with_keyed_noise():
    policy, task = make_policy(seed=3), build(make_recipe().config, {})
    with Local(task) as backend:
        (trajectory,) = backend.collect(small_plan(12), Weights.of(policy, 5))
    (item,) = small_plan(12)
    noise = chain_noise((11, "rollout", 2), range(12), 4, SHAPE)
    cond = torch.tensor(item.groups)
    end = sample(policy, noise, task.times, cond)
    assert torch.equal(trajectory.x[:, -1], end)
    assert torch.equal(trajectory.x[:, 0], noise[:, 0] * policy.prior_std(task.times))
    assert torch.equal(trajectory.group, cond)
    assert torch.equal(trajectory.cond, cond)
    assert torch.equal(trajectory.reward, to_pixels(end).flatten(1).mean(1))
    assert trajectory.version == 5
    for k in range(4):
        obs = Observation(trajectory.x[:, k], task.times[k], task.times[k + 1], cond)
        log_prob = policy(obs).log_prob(trajectory.x[:, k + 1])
        torch.testing.assert_close(trajectory.log_prob[:, k], log_prob, equal_nan=True, **ROUNDING)
    assert trajectory.log_prob[:, :3].isfinite().all()
    assert not trajectory.x.requires_grad


def test_the_item_size_changes_results_by_rounding_alone():
    weights, task = Weights.of(make_policy(), 5), build(make_recipe().config, {})
    whole, cut = (concatenate(Local(task).collect(small_plan(size), weights)) for size in (12, 5))
    assert torch.equal(whole.x[:, 0], cut.x[:, 0])
    torch.testing.assert_close(whole.x, cut.x, **ROUNDING)
    torch.testing.assert_close(whole.reward, cut.reward, **ROUNDING)


def test_samples_iterations_and_seeds_have_noise_of_their_own():
    task, weights = build(make_recipe().config, {}), Weights.of(make_policy(), 5)
    parts = Local(task).collect([*small_plan(), *small_plan(iteration=3), *plan(12, 2, 3, 4, 4, CLASSES, 5)], weights)
    starts = concatenate(parts).x[:, 0].flatten(1)
    assert len(starts.unique(dim=0)) == 36


def test_a_later_submission_uses_its_own_weights_even_if_asked_for_first():
    old, new = Weights.of(make_policy(seed=0), 5), Weights.of(make_policy(seed=9), 6)
    task = build(make_recipe().config, {})
    expected = Local(task).collect(small_plan(version=5), old)
    with Local(task) as backend:
        first = backend.submit(small_plan(version=5), old)
        second = backend.submit(small_plan(version=6), new)
        later = second()
        for a, b in zip(first(), expected):
            assert_identical(a, b)
    assert not torch.equal(later[0].x, expected[0].x)


def test_an_item_that_asks_for_other_weights_is_refused():
    backend = Local(build(make_recipe().config, {}))
    with pytest.raises(WeightsError, match=r"item 0 of iteration 2 .*weights 4.*: got weights of version 5"):
        backend.collect(small_plan(version=4), Weights.of(make_policy(), 5))


def test_damaged_weights_are_refused():
    weights = Weights.of(make_policy(), 5)
    damaged = Weights(5, weights.sha256, weights.blob[:-4] + b"\x00\x01\x02\x03")
    with pytest.raises(WeightsError, match="SHA-256"):
        Local(build(make_recipe().config, {})).collect(small_plan(), damaged)


def test_a_reward_that_is_not_finite_is_named_with_its_item():
    with pytest.raises(RewardError, match="brightness") as caught:
        Local(make_recipe("nan").build()).collect(small_plan(), Weights.of(make_policy(), 5))
    assert caught.value.__notes__ == ["in item 0 of iteration 2 (samples 0..3, weights 5)"]


@pytest.mark.parametrize("name", ["nowhere:build", "rollout_tasks:nothing", "rollout_tasks", ":build"])
def test_an_unknown_builder_is_a_config_error(name):
    with pytest.raises(ConfigError, match=r"expected package\.module:function"):
        Recipe(name, {}).build()


def test_a_recipe_must_be_json():
    with pytest.raises(ConfigError, match="not JSON"):
        Recipe("rollout_tasks:build", {"x": object()}).build()


@pytest.mark.parametrize(
    "cond", [None, torch.arange(6).reshape(2, 3), {"a": {"b": torch.ones(2)}, "c": torch.zeros(2)}]
)
def test_a_trajectory_crosses_the_wire_exactly(cond):
    trajectory = Trajectory(
        torch.randn(2, 3, 1, 2, 2), torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64),
        torch.tensor([[0.5, torch.nan]] * 2), torch.randn(2), torch.tensor([1, 0]), cond, 9,
    )  # fmt: skip
    record, blob = to_wire(trajectory)
    back = from_wire(record, blob)
    assert to_wire(back) == (record, blob)
    assert back.version == 9
    assert back.times.dtype == torch.float64
    assert (back.cond is None) == (cond is None)


def test_without_workers_ray_is_never_imported():
    code = (
        "import sys; sys.path.insert(0, 'tests/support'); from rollout_tasks import make_recipe; "
        "from rlfusion.rollout import *; make_backend(make_recipe(), Settings()).close(); print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert isinstance(make_backend(make_recipe(), Settings()), Local)


@pytest.mark.parametrize("settings", [{"workers": -1}, {"threads": 0}, {"cpus_per_worker": -0.5}])
def test_settings_below_their_least_value_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Settings(**settings)


def test_the_states_of_a_rollout_are_joined_without_a_copy():
    items = small_plan(item_size=5)
    recipe = make_recipe()
    parts = make_backend(recipe, Settings()).collect(items, Weights.of(build(recipe.config, {}).policy, 5))
    whole = concatenate(parts)
    walk = whole.x[0].nbytes
    assert [part.x.data_ptr() - whole.x.data_ptr() for part in parts] == [0, 5 * walk, 10 * walk]
    assert_identical(whole, concatenate([replace(p, x=p.x.clone()) for p in parts]))
    with counting() as ops:
        one = concatenate(parts[:1])
    assert one is parts[0]
    assert not ops


@pytest.mark.parametrize("taken", [[1, 0], [0, 2], [0, 1], [0, 1, 1]])
def test_parts_that_are_no_whole_are_joined_by_a_copy(taken):
    x = torch.arange(24.0).reshape(6, 4)
    parts = [x[0:2], x[2:4], x[4:6]]
    some = [Trajectory(parts[i], torch.ones(1), None, None, torch.zeros(2), None, 0) for i in taken]
    whole = concatenate(some)
    assert torch.equal(whole.x, torch.cat([parts[i] for i in taken]))
    assert whole.x.data_ptr() != x.data_ptr()


class Steps(DDIM):
    """Noise in some steps only, told by the time that they begin at."""

    def coefficients(self, t, s, dt):
        found = super().coefficients(t, s, dt)
        return found._replace(std=found.std * ((t.alpha < 0.1) | ((t.alpha > 0.6) & (t.alpha < 0.8))))


@pytest.mark.parametrize(
    ("kernel", "columns"), [(DDIM(1.0), 4), (DDIM(0.0), 1), (Steps(1.0), 4), (Steps(0.9), 4)], ids=str
)
def test_noise_is_drawn_as_far_as_a_step_takes_it(kernel, columns, monkeypatch):
    """The walk is that of ``sample`` with all noise; a step that takes none draws none after the last that does."""
    recipe, item = make_recipe(), small_plan()[1]
    task = build(recipe.config, {})
    task = replace(task, policy=Policy(task.policy.denoiser, kernel))
    asked, drawn = [], noises
    monkeypatch.setattr("rlfusion.rollout.task.noises", lambda i, n, shape: asked.append(n) or drawn(i, n, shape))
    walked = run_item(task, item)
    noise = chain_noise((11, "rollout", 2), item.samples, 4, SHAPE)
    assert torch.equal(walked.x[:, -1], sample(task.policy, noise, task.times, torch.tensor(item.groups)))
    assert asked == [columns]
    stopped = run_item(replace(task, rollout_spec=prefix(2, 2)), item)
    assert torch.equal(stopped.x[:, 0], walked.x[:, 2])
    assert asked[1] <= 3


def test_the_states_of_a_walk_are_written_once():
    """No list of states is stacked in the end: each is copied into its place, and nothing as large is made besides."""
    task, item = build(make_recipe().config, {}), small_plan(item_size=12)[0]
    with counting() as ops:
        walked = run_item(task, item)
    assert walked.x.shape == (12, 5, *SHAPE)
    assert ops["aten.stack"] == 1  # log-probabilities
