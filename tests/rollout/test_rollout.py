"""Work items, the in-process backend, and the scheduler under simulated kills, hangs and duplicates."""

import heapq
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from rollout_tasks import CLASSES, SHAPE, assert_identical, build, make_policy, make_recipe
from rounding import ROUNDING

from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import Weights, WeightsError
from rlfusion.data import to_pixels
from rlfusion.diffusion.policy import Observation
from rlfusion.diffusion.sampling import chain_noise, sample
from rlfusion.rewards import RewardError
from rlfusion.rollout import Limits, Local, Recipe, RolloutError, Settings, WorkItem, make_backend, plan, version_for
from rlfusion.rollout.item import choose_prompts
from rlfusion.rollout.scheduler import Assign, Kill, Scheduler, Start
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


# ---------------------------------------------------------------------------------------------------- the scheduler

LIMITS = Limits(item_s=10, item_floor_s=10, start_s=30, attempts=3, replacements=3)


def started(size: int, names: list[str], limits: Limits = LIMITS) -> Scheduler:
    scheduler = Scheduler(size, limits)
    _, commands = scheduler.add(names, [4] * len(names), 0.0)
    assert commands == [Start(worker) for worker in range(min(size, len(names)))]
    for worker in range(min(size, len(names))):
        assert scheduler.ready(worker, 1.0) == [Assign(worker, worker)]
    return scheduler


def test_items_go_out_in_order_and_no_more_workers_start_than_there_are_items():
    scheduler = started(2, ["a", "b", "c"])
    assert scheduler.result(1, 1, 2.0) == (True, [Assign(1, 2)])
    assert scheduler.result(0, 0, 2.0) == (True, [])
    assert scheduler.result(1, 2, 3.0) == (True, [])
    assert scheduler.open == {}
    assert scheduler.idle == [0, 1]
    assert scheduler.add(["d"], [4], 4.0) == (range(3, 4), [Assign(0, 3)])
    started(5, ["a"])


def test_a_dead_worker_is_replaced_and_its_item_goes_first():
    scheduler = started(2, ["a", "b", "c"])
    assert scheduler.lost(0, "died", 2.0) == [Start(2)]
    assert scheduler.result(1, 1, 3.0) == (True, [Assign(1, 0)])
    assert scheduler.ready(2, 4.0) == [Assign(2, 2)]


def test_a_hung_worker_is_killed_at_its_deadline_and_a_late_answer_counts_once():
    scheduler = started(1, ["a"])
    assert scheduler.deadline() == 11.0
    assert scheduler.tick(10.9) == []
    assert scheduler.tick(11.0) == [Kill(0), Start(1)]
    assert scheduler.ready(1, 12.0) == [Assign(1, 0)]
    assert scheduler.result(0, 0, 13.0) == (True, [])
    assert scheduler.result(1, 0, 14.0) == (False, [])
    assert scheduler.idle == [1]


def test_a_late_answer_takes_its_item_out_of_the_queue():
    scheduler = started(1, ["a"])
    assert scheduler.tick(11.0) == [Kill(0), Start(1)]
    assert scheduler.result(0, 0, 12.0) == (True, [])
    assert scheduler.ready(1, 13.0) == []


def test_losses_count_from_the_last_item_done():
    scheduler = started(1, ["a", "b", "c"])
    for item in range(3):  # 6 losses in all, but never more than 3 without an item
        for _ in range(2):
            (start,) = scheduler.lost(max(scheduler.workers), "died", 2.0)
        assert scheduler.ready(start.worker, 3.0) == [Assign(start.worker, item)]
        assert scheduler.result(start.worker, item, 4.0)[0]
    assert scheduler.open == {}


def test_a_worker_that_never_starts_is_replaced_until_the_limit_and_the_error_says_so():
    scheduler = Scheduler(1, LIMITS)
    scheduler.add(["item 0 of iteration 4"], [4], 0.0)
    for n in range(1, 4):
        assert scheduler.tick(30.0 * n) == [Kill(n - 1), Start(n)]
    with pytest.raises(
        RolloutError, match=r"4 workers were lost.*item 0 of iteration 4.*not ready within ray.limits.start_s = 30 s"
    ):
        scheduler.tick(120.0)


def test_an_item_that_kills_its_workers_ends_the_run_by_name():
    scheduler = started(9, ["poison", "b"])
    for worker, successor in ((0, 2), (2, 3)):
        assert scheduler.lost(worker, "died", 2.0) == [Start(successor)]
        assert scheduler.ready(successor, 3.0) == [Assign(successor, 0)]
    with pytest.raises(RolloutError, match="poison lost its worker 3 times; the last ran out of memory"):
        scheduler.lost(3, "ran out of memory", 4.0)


@pytest.mark.parametrize("name", ["item_s", "item_times", "item_floor_s", "start_s", "attempts", "replacements"])
def test_limits_are_positive(name):
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        Limits(**{name: 0})


class Simulation:
    """Workers as events in a heap. Each start or item ends well, kills the worker, or hangs; answers may come twice,
    and late, even from the killed. ``trouble`` is the chance of each fault."""

    def __init__(
        self, size: int, limits: Limits, trouble: float, seed: int, seconds: float = 1.0, samples: int = 4
    ) -> None:
        self.random, self.trouble, self.now, self.order = random.Random(seed), trouble, 0.0, 0
        self.seconds, self.samples = seconds, samples
        self.scheduler, self.events = Scheduler(size, limits), []
        self.size, self.alive, self.leases, self.answers = size, set(), {}, {}

    def post(self, delay: float, *event) -> None:
        self.order += 1
        heapq.heappush(self.events, (self.now + delay, self.order, event))

    def execute(self, commands) -> None:
        for command in commands:
            if isinstance(command, Kill):
                self.alive.discard(command.worker)
                self.leases.pop(command.worker, None)
                continue
            if isinstance(command, Start):
                self.alive.add(command.worker)
                assert len(self.alive) <= self.size
            else:
                assert command.worker in self.alive
                assert command.worker not in self.leases
                assert command.item not in self.leases.values()  # never two leases of one item
                self.leases[command.worker] = command.item
            self.begin(command)

    def begin(self, command) -> None:
        event = ("ready", command.worker) if isinstance(command, Start) else ("result", command.worker, command.item)
        fate, delay = self.random.random(), self.random.expovariate(1 / self.seconds)
        if fate < self.trouble:
            self.post(delay, "lost", command.worker)
        elif fate >= 2 * self.trouble:  # between the two it hangs
            self.post(delay, *event)
        if self.random.random() < self.trouble:
            self.post(delay * 30, *event)  # a duplicate, or a very late first answer

    def handle(self, kind: str, worker: int, item: int = -1) -> None:
        if kind == "ready":
            self.execute(self.scheduler.ready(worker, self.now))
        elif kind == "lost" and worker in self.alive:
            self.alive.discard(worker)
            self.leases.pop(worker, None)
            self.execute(self.scheduler.lost(worker, "died", self.now))
        elif kind == "result":
            if self.leases.get(worker) == item:
                del self.leases[worker]
            first, commands = self.scheduler.result(worker, item, self.now)
            self.answers[item] = self.answers.get(item, 0) + first
            self.execute(commands)

    def run(self, count: int) -> range:
        numbers, commands = self.scheduler.add([f"item {n}" for n in range(count)], [self.samples] * count, self.now)
        self.execute(commands)
        while self.scheduler.open:
            deadline = self.scheduler.deadline()
            if self.events and self.events[0][0] < deadline:
                self.now, _, event = heapq.heappop(self.events)
                self.handle(*event)
            else:
                assert deadline < float("inf"), "nothing would ever happen again"
                self.now = deadline
            self.execute(self.scheduler.tick(self.now))
        return numbers


@pytest.mark.parametrize(
    ("size", "trouble", "seed"),
    [(s, p, seed) for s, p in ((1, 0.02), (7, 0.1), (40, 0.3)) for seed in range(5)] + [(300, 0.1, 0), (300, 0.3, 1)],
)
def test_every_item_is_answered_exactly_once_whatever_the_workers_do(size, trouble, seed):
    limits = Limits(item_s=8, item_floor_s=8, start_s=8, attempts=50, replacements=20)
    simulation = Simulation(size, limits, trouble, seed)
    for _ in range(3):
        numbers = simulation.run(3 * size + 5)
        assert [simulation.answers[n] for n in numbers] == [1] * len(numbers)
    assert simulation.now < 100_000  # answers 30 times as late as others stretch the leases of those that hang


def test_without_trouble_a_simulation_loses_no_worker_and_no_time():
    simulation = Simulation(10, LIMITS, 0.0, 0)
    simulation.run(100)
    assert sorted(simulation.scheduler.workers) == list(range(10))


def test_when_every_worker_dies_the_run_ends_with_the_reason():
    simulation = Simulation(50, LIMITS, 1.0, 0)
    with pytest.raises(RolloutError, match="lost"):
        simulation.run(100)
    assert simulation.now < 1000


PATIENT = Limits(item_s=1000, item_times=10, item_floor_s=5, start_s=1000)


@pytest.mark.parametrize(("seconds", "samples"), [(0.01, 4), (1.0, 4), (60.0, 1)])
def test_items_that_are_only_slow_are_never_killed_whatever_they_take(seconds, samples):
    """Exponential durations: the longest of 600 is some 6.4 of their mean, and a lease 10 times the p99."""
    simulation = Simulation(20, PATIENT, 0.0, 1, seconds, samples)
    for _ in range(3):
        simulation.run(200)
    assert sorted(simulation.scheduler.workers) == list(range(20))


def test_items_of_more_samples_are_given_more_time_and_a_small_first_one_misleads_nobody():
    scheduler = started(1, ["a preflight of one sample"], PATIENT)  # begun at 1
    assert scheduler.deadline() == 1 + 1000
    assert scheduler.result(0, 0, 3.0) == (True, [])  # 2 s, but it was given out as 4 samples: 0.5 s each
    scheduler.add(["240 samples"], [240], 10.0)
    assert scheduler.deadline() == 10 + 10 * 240 * 0.5
    assert scheduler.tick(1209.0) == []
    assert scheduler.tick(1210.0) == [Kill(0), Start(1)]


def test_what_items_take_moves_the_deadlines_of_those_that_run_but_never_below_the_floor():
    scheduler = started(2, ["a", "b", "c"], PATIENT)
    assert scheduler.deadline() == 1 + 1000
    scheduler.result(1, 1, 1.2)
    assert scheduler.deadline() == 1 + 5  # 10 times 0.2 s is below the floor
    scheduler.result(1, 2, 4.2)
    assert scheduler.deadline() == 1 + 10 * 3


def test_one_odd_item_of_two_hundred_moves_no_deadline():
    """The 99th percentile of 200 durations is the third longest."""
    scheduler = started(1, ["first"], PATIENT)
    scheduler.result(0, 0, 2.0)
    for n in range(1, 201):
        now = 1000.0 * n
        scheduler.add([f"item {n}"], [4], now)
        scheduler.result(0, n, now + (50.0 if n == 100 else 1.0))
    scheduler.add(["last"], [4], 10.0**6)
    assert scheduler.deadline() == 10.0**6 + 10


def test_a_hung_worker_is_found_in_the_time_of_a_few_items():
    """One of two workers hangs with its first item, when nothing was measured yet; 0.1 s is what items take."""
    scheduler = Scheduler(2, PATIENT)
    scheduler.add([str(n) for n in range(20)], [4] * 20, 0.0)
    scheduler.ready(0, 0.0)
    scheduler.ready(1, 0.0)  # hangs with item 1
    for n in [0, *range(2, 20)]:
        scheduler.result(0, n, 0.1 * n)
    assert scheduler.deadline() == 5.0
    assert scheduler.tick(5.0) == [Kill(1), Assign(0, 1)]


def test_an_item_that_takes_longer_than_its_lease_is_given_twice_as_long_each_time():
    scheduler = started(1, ["slow"])
    assert scheduler.tick(11.0) == [Kill(0), Start(1)]
    scheduler.ready(1, 20.0)
    assert scheduler.deadline() == 40.0
    assert scheduler.tick(40.0) == [Kill(1), Start(2)]
    scheduler.ready(2, 50.0)
    assert scheduler.deadline() == 90.0
    assert scheduler.result(2, 0, 89.0) == (True, [])


@pytest.mark.parametrize("seed", range(3))
def test_the_hung_are_found_long_before_the_first_lease_is_over(seed):
    limits = Limits(item_s=10**6, item_floor_s=5, start_s=20, attempts=50, replacements=20)
    simulation = Simulation(30, limits, 0.05, seed)
    simulation.run(100)
    assert simulation.now < 10**5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"item_times": 0.5}, "item_times = 0.5: expected a number >= 1"),
        ({"item_floor_s": 20.0, "item_s": 10.0}, "item_floor_s = 20: expected at most item_s = 10"),
        ({"item_times": math.nan}, "item_times = nan"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Limits(**wrong)
