"""The scheduler under simulated kills, hangs, failures, twins and duplicates."""

import math

import pytest

from rlfusion.common.errors import ConfigError
from rlfusion.rollout import Limits, RolloutError
from rlfusion.rollout.commands import Assign, GiveUp, Kill, Start, TwinsDiffer
from rlfusion.rollout.scheduler import Scheduler
from rlfusion.rollout.simulation import Faults, Learning, Rollouts, VirtualPool, about, train

LIMITS = Limits(item_s=10, item_floor_s=10, start_s=30, twin_times=0)


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


def test_an_item_that_kills_three_workers_is_given_up():
    scheduler = started(9, ["poison", "b"])
    for worker, successor in ((0, 2), (2, 3)):
        assert scheduler.lost(worker, "died", 2.0) == [Start(successor)]
        assert scheduler.ready(successor, 3.0) == [Assign(successor, 0)]
    given_up = GiveUp(0, "poison", {0: "died", 2: "died", 3: "ran out of memory"})
    assert scheduler.lost(3, "ran out of memory", 4.0) == [given_up]
    assert [*scheduler.open] == [1]


@pytest.mark.parametrize("name", ["item_s", "item_times", "item_floor_s", "start_s", "crashes", "preemptions"])
def test_limits_are_positive(name):
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        Limits(**{name: 0})


def exponential(seconds: float):
    return lambda draw: draw.expovariate(1 / seconds)


def troubled(size: int, limits: Limits, trouble: float, seed: int) -> VirtualPool:
    """Each start or item ends well, kills the worker, or hangs; answers come twice, and late, even from the killed."""
    return VirtualPool(size, limits, Faults(trouble, trouble, echoes=trouble), seed, exponential(1.0))


def ran(pool: VirtualPool, count: int, samples: int = 4) -> range:
    numbers = pool.submit([f"item {n}" for n in range(count)], [samples] * count)
    pool.wait(numbers)
    return numbers


@pytest.mark.parametrize(
    ("size", "trouble", "seed"),
    [(s, p, seed) for s, p in ((1, 0.02), (7, 0.1), (40, 0.3)) for seed in range(5)] + [(300, 0.1, 0), (300, 0.3, 1)],
)
def test_every_item_is_answered_exactly_once_whatever_the_workers_do(size, trouble, seed):
    limits = Limits(item_s=8, item_floor_s=8, start_s=8, crashes=50, preemptions=20)
    pool = troubled(size, limits, trouble, seed)
    for _ in range(3):
        numbers = ran(pool, 3 * size + 5)
        assert [pool.answers[n] for n in numbers] == [1] * len(numbers)
    assert pool.now < 100_000  # answers 30 times as late as others stretch the leases of those that hang


def test_without_trouble_a_simulation_loses_no_worker_and_no_time():
    pool = troubled(10, LIMITS, 0.0, 0)
    ran(pool, 100)
    assert sorted(pool.scheduler.workers) == list(range(10))


def test_when_every_worker_dies_the_run_ends_with_the_reason():
    pool = troubled(50, LIMITS, 1.0, 0)
    with pytest.raises(RolloutError, match=r"preemptions = 3 \(times 50 workers\) is spent: 151 workers were"):
        ran(pool, 100)
    assert pool.now < 1000


PATIENT = Limits(item_s=1000, item_times=10, item_floor_s=5, start_s=1000, twin_times=0)


@pytest.mark.parametrize(("seconds", "samples"), [(0.01, 4), (1.0, 4), (60.0, 1)])
def test_items_that_are_only_slow_are_never_killed_whatever_they_take(seconds, samples):
    """Exponential durations: the longest of 600 is some 6.4 of their mean, and a lease 10 times the p99."""
    pool = VirtualPool(20, PATIENT, seed=1, times=exponential(seconds))
    for _ in range(3):
        ran(pool, 200, samples)
    assert sorted(pool.scheduler.workers) == list(range(20))


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
    limits = Limits(item_s=10**6, item_floor_s=5, start_s=20, crashes=50, preemptions=20)
    pool = troubled(30, limits, 0.05, seed)
    ran(pool, 100)
    assert pool.now < 10**5


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


# -------------------------------------------------------------------------------------- failures, twins, nodes, budgets


def working(size: int, limits: Limits = LIMITS) -> Scheduler:
    """All workers idle, after five items of 4 samples that took 1 s each."""
    scheduler = Scheduler(size, limits)
    scheduler.add([f"before {n}" for n in range(5 * size)], [4] * 5 * size, 0.0)
    for worker in range(size):
        scheduler.ready(worker, 0.0)
    for n in range(5 * size):
        scheduler.result(n % size, n, float(n // size + 1))
    assert scheduler.idle == [*range(size)]
    return scheduler


TWINS = Limits(item_s=100, item_floor_s=50, twin_times=3)


def test_an_item_that_raises_is_tried_on_other_workers_and_then_given_up():
    scheduler = started(3, ["poison", "b", "c"])
    scheduler.result(1, 1, 2.0)
    assert scheduler.failed(0, 0, "raised KeyError", 3.0) == [Assign(1, 0)]
    assert scheduler.result(2, 2, 4.0) == (True, [])
    assert scheduler.failed(1, 0, "raised KeyError", 5.0) == [Assign(2, 0)]
    said = {0: "raised KeyError", 1: "raised KeyError", 2: "raised ValueError"}
    assert scheduler.failed(2, 0, "raised ValueError", 6.0) == [GiveUp(0, "poison", said)]
    assert not scheduler.open


def test_an_item_never_goes_back_to_a_worker_that_it_failed_on_and_an_idle_one_makes_room():
    scheduler = started(1, ["a"])
    assert scheduler.failed(0, 0, "raised", 2.0) == [Kill(0), Start(1)]
    assert scheduler.ready(1, 3.0) == [Assign(1, 0)]
    assert scheduler.result(1, 0, 4.0) == (True, [])


def test_a_worker_makes_no_room_while_another_may_still_try_the_item():
    scheduler = started(2, ["a", "b"])
    assert scheduler.failed(0, 0, "raised", 2.0) == []
    assert scheduler.result(1, 1, 3.0) == (True, [Assign(1, 0)])


def test_a_worker_lost_with_its_node_costs_a_preemption_and_no_crash():
    limits = Limits(item_s=10, item_floor_s=10, start_s=30, crashes=2, preemptions=5)
    scheduler = started(1, ["a"], limits)
    for n in range(5):
        assert scheduler.lost(n, "its node left", 2.0 + n, preempted=True) == [Start(n + 1)]
        assert scheduler.ready(n + 1, 2.5 + n) == [Assign(n + 1, 0)]
    with pytest.raises(RolloutError, match=r"preemptions = 5 \(times 1 workers\) is spent: 6 workers .*its node left"):
        scheduler.lost(5, "its node left", 9.0, preempted=True)


def test_a_slow_item_is_given_to_an_idle_worker_too_and_the_first_answer_counts():
    scheduler = working(2, TWINS)
    assert scheduler.add(["slow"], [8], 10.0)[1] == [Assign(0, 10)]
    assert scheduler.deadline() == 10 + 3 * 2  # three times the median of 0.25 s a sample, of 8
    assert scheduler.tick(15.9) == []
    assert scheduler.tick(16.0) == [Assign(1, 10)]
    assert scheduler.twins == 1
    assert scheduler.tick(30.0) == []  # no third one
    assert scheduler.twinned(10)
    assert scheduler.result(1, 10, 31.0, "bits") == (True, [])
    assert scheduler.twinned(10)
    assert scheduler.result(0, 10, 32.0, "bits") == (False, [])
    assert scheduler.idle == [1, 0]
    assert not scheduler.twinned(10)


def test_answers_of_twins_that_differ_are_an_error_that_names_item_and_workers():
    scheduler = working(2, TWINS)
    scheduler.add(["slow"], [4], 10.0)
    scheduler.tick(13.0)
    scheduler.result(1, 10, 14.0, "bits")
    with pytest.raises(TwinsDiffer, match=r"slow: workers 1 and 0 gave different answers .*bits and other") as caught:
        scheduler.result(0, 10, 15.0, "other")
    assert caught.value.exit_code == 4


def test_answers_of_workers_of_two_kinds_are_not_compared():
    scheduler = Scheduler(2, TWINS)
    scheduler.add([f"{n}" for n in range(7)], [4] * 7, 0.0)
    scheduler.ready(0, 0.0, "H100")
    scheduler.ready(1, 0.0, "A100")
    for n in (1, 2, 3, 4, 5):
        scheduler.result(1, n, float(n))
    assert scheduler.result(1, 6, 6.0)[1] == [Assign(1, 0)]
    scheduler.result(1, 0, 8.0, "bits")
    assert scheduler.result(0, 0, 9.0, "other") == (False, [])


def test_no_twin_is_given_while_items_wait_or_where_twins_are_off():
    scheduler = working(2, TWINS)
    scheduler.add(["slow", "b", "c"], [4] * 3, 10.0)
    assert scheduler.tick(40.0) == []  # c waits
    assert scheduler.result(1, 11, 41.0)[1] == [Assign(1, 12)]
    assert scheduler.result(1, 12, 42.0)[1] == [Assign(1, 10)]
    off = working(2, Limits(item_s=100, item_floor_s=50, twin_times=0))
    off.add(["slow"], [4], 10.0)
    assert off.tick(50.0) == []


def test_a_twin_goes_on_alone_where_the_other_is_lost():
    scheduler = working(2, TWINS)
    scheduler.add(["slow"], [4], 10.0)
    assert scheduler.tick(13.0) == [Assign(1, 10)]
    assert scheduler.lost(0, "died", 14.0) == []
    assert scheduler.failed(1, 10, "raised", 15.0) == [Kill(1), Start(2)]
    assert scheduler.ready(2, 16.0) == [Assign(2, 10)]


def test_a_worker_that_finds_no_room_waits_while_others_work_and_works_when_a_node_joins():
    scheduler = Scheduler(2, Limits(item_floor_s=1000, start_s=30))
    scheduler.add([f"{n}" for n in range(4)], [4] * 4, 0.0)
    scheduler.placed(0, 1.0)
    scheduler.ready(0, 2.0)
    scheduler.result(0, 0, 3.0)
    for now in (30.0, 60.0):
        assert Kill(1) not in scheduler.tick(now)
    scheduler.placed(1, 61.0)
    assert Assign(1, 2) in scheduler.ready(1, 62.0)


def test_an_item_that_failed_on_the_only_worker_there_is_room_for_gets_another_in_its_place():
    scheduler = Scheduler(2, Limits(item_floor_s=1000, start_s=30))
    scheduler.add(["a", "b"], [4] * 2, 0.0)
    scheduler.placed(0, 1.0)
    scheduler.ready(0, 2.0)
    assert scheduler.failed(0, 0, "raised", 3.0) == [Assign(0, 1)]
    scheduler.result(0, 1, 4.0)
    assert scheduler.tick(29.0) == []  # the other may yet find its place
    assert scheduler.deadline() == 30.0
    assert scheduler.tick(30.0) == [Kill(0)]
    assert scheduler.placed(1, 31.0) == []
    assert scheduler.ready(1, 40.0) == [Assign(1, 0)]


def test_a_worker_that_has_a_place_and_never_builds_its_task_is_replaced():
    scheduler = Scheduler(2, LIMITS)
    scheduler.add(["a", "b"], [4] * 2, 0.0)
    scheduler.ready(0, 2.0)
    scheduler.placed(1, 20.0)
    assert scheduler.tick(49.9) == [Kill(0), Start(2)]  # which has had its item for more than 10 s
    assert scheduler.tick(50.0)[:2] == [Kill(1), Start(3)]


def test_items_that_are_dropped_are_finished_for_nothing():
    scheduler = started(2, ["a", "b", "c"])
    assert scheduler.drop([0, 2], 2.0) == []
    assert scheduler.result(0, 0, 3.0) == (False, [])
    assert scheduler.failed(1, 1, "raised", 3.0) == [Assign(0, 1)]
    assert scheduler.result(0, 1, 4.0) == (True, [])
    assert not scheduler.open


@pytest.mark.parametrize("wrong", [{"twin_times": 0.5}, {"crashes": 1}, {"twin_times": -1}, {"preemptions": math.nan}])
def test_limits_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)


# ------------------------------------------------------------------------------------------------- a cluster in numbers

CLUSTER = Limits(item_s=600, item_floor_s=30, start_s=60)
WEAR = Faults(kills=0.01, hangs=0.004, raises=0.004, echoes=0.01, slow=0.1, slowness=5, outage_every_s=40, outage_s=30)


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_whatever_fails_each_item_is_learned_from_once_and_in_order(lag):
    pool = VirtualPool(48, CLUSTER, WEAR, seed=lag, times=about(4.0))
    report = train(pool, Learning(64, 5.0, kills=0.002, restart_s=20), Rollouts(12, 96, 4, lag), seed=lag)
    assert [step for step, _ in report.consumed] == [step for step in range(12) for _ in range(96)]
    assert report.consumed == sorted(report.consumed)
    assert len({item for _, item in report.consumed}) == len(report.consumed)
    assert {pool.answers[item] for _, item in report.consumed} == {1}
    assert report.lost > 5
    assert report.groups > 0
    assert report.twins > 0
    assert not pool.given_up


def test_a_lag_hides_the_time_of_learning_and_keeps_workers_and_ranks_at_work():
    found = [
        train(VirtualPool(48, CLUSTER, seed=1, times=about(4.0)), Learning(64, 8.0), Rollouts(32, 96, 4, lag))
        for lag in (0, 1)
    ]
    assert found[0].step_s > 1.4 * found[1].step_s
    assert found[1].workers > 1.4 * found[0].workers
    assert found[1].ranks > 1.4 * found[0].ranks


def test_twins_shorten_rollouts_on_slow_machines():
    slow = Faults(slow=0.1, slowness=10)
    limits = [Limits(item_s=600, item_floor_s=150, twin_times=times) for times in (0, 3)]
    without, with_twins = (
        train(VirtualPool(40, one, slow, 3, about(4.0)), Learning(8, 1.0), Rollouts(10, 80, 4)) for one in limits
    )
    assert with_twins.step_s < 0.7 * without.step_s


def test_an_answer_with_other_bits_is_found_by_twins():
    pool = VirtualPool(20, CLUSTER, Faults(wrong=0.5, slow=0.4, slowness=5), 0, about(1.0))

    def checked() -> None:
        ran(pool, 200)
        pool.advance(100.0)  # the second answers

    with pytest.raises(TwinsDiffer):
        checked()


def test_an_item_that_always_raises_is_given_up():
    pool = VirtualPool(4, CLUSTER, Faults(raises=1.0), 0)
    with pytest.raises(RolloutError, match="given up"):
        ran(pool, 1)
    assert [len(one.failed) for one in pool.given_up] == [3]
