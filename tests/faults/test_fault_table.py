"""What goes wrong on a cluster of three nodes, and what a run makes of it: the same weights, and no sample lost.

Each row trains the same learner by the product's own collector and Ray backend while one thing goes wrong. The table is
printed at the end (``make faults``). What is tried elsewhere: lost ranks (``test_lost_ranks``), a full disk and a
driver under supervise (``test_fault_runs``), every write of a checkpoint (``test_checkpoint_kills``).
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clusters import Nodes, several
from fault_rows import Row, check
from processes import titled
from rollout_tasks import make_policy, make_recipe
from tiny_training import UPDATES, Trained, trained

from rlfusion.common.weights import Weights
from rlfusion.diffusion.policy import Policy
from rlfusion.rollout import Limits, Settings, make_backend
from rlfusion.rollout.placement import Role

pytestmark = [pytest.mark.alone, pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")]

ray = pytest.importorskip("ray")
ray_cluster = pytest.importorskip("rlfusion.rollout.ray_cluster")

LIMITS = Limits(item_s=8, item_floor_s=8, start_s=150, twin_times=20)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes for a worker each."""
    with several({}, {}) as held:
        yield held


@pytest.fixture(scope="module")
def whole(nodes, tmp_path_factory) -> Trained:
    """Undisturbed, by the same workers; and that is what one process gives."""
    with make_backend(make_recipe(), Settings()) as local:
        expected = trained(local)
    with pool("slow", tmp_path_factory.mktemp("whole") / "ran") as backend:
        found = trained(backend)
    assert found.digest == expected.digest
    return found


def pool(fault: str = "", marker: Path | None = None, limits: Limits = LIMITS):
    return make_backend(make_recipe(fault, marker), Settings(workers=2, limits=limits))


def handled(backend) -> tuple[int, ...]:
    """What the scheduler has done about faults so far."""
    scheduler = backend._scheduler
    return scheduler._started, scheduler.twins, sum(len(item.failed) for item in scheduler.open.values())


def disturbed(
    backend, fault: Callable[[], None], whole: Trained, name: str, handled: Callable[[Any], Any] = handled
) -> Row:
    """Train while ``fault`` happens after the first update: the row of the table. It is seen when what was ``handled``
    changes.
    """
    seen, progress, happening = [math.nan], list[int](), list[Future[None]]()

    def watch() -> None:
        while not progress:
            time.sleep(0.01)
        before, began = handled(backend), time.monotonic()
        happening.append(threads.submit(fault))
        while math.isnan(seen[0]) and len(progress) < UPDATES:
            if handled(backend) != before:
                seen[0] = time.monotonic() - began
            time.sleep(0.01)

    with ThreadPoolExecutor(2) as threads:
        watching = threads.submit(watch)
        found = trained(backend, progress)
        watching.result()
        happening[0].result()
    lost = sum(whole.walks) - sum(found.walks)
    return Row(name, seen[0], max(0.0, found.seconds - whole.seconds), lost, found.digest == whole.digest)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rollout_worker(nodes, whole, table, tmp_path, number):
    with pool("slow", tmp_path / "ran") as backend:

        def fault() -> None:
            os.kill(titled("ray::Worker")[-1], number)

        row = disturbed(backend, fault, whole, f"{number.name} of a rollout worker")
    check(row, table)
    assert not math.isnan(row.seen_s)


REWARD = """
import time

def brightness(samples, cond):
    time.sleep(0.2)
    return samples.flatten(1).mean(1)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reward_worker(nodes, whole, table, tmp_path, number):
    from rlfusion.rollout.ray_rewards import reward_actors

    (tmp_path / "asked.py").write_text(REWARD)
    reward, role = f"{tmp_path / 'asked.py'}:brightness", Role("reward workers", 2, 0.0)
    limits = Limits(item_s=60, item_floor_s=30, start_s=150)  # half a floor after its last answer one is seen to hang
    settings = Settings(workers=2, limits=limits, rewards=role)
    with (
        reward_actors({reward: {}}, {}, settings, 0, 0) as actors,
        make_backend(make_recipe(actors=actors), settings) as backend,
    ):
        before: set[int] = set()

        def fault() -> None:
            before.update(titled("ray::RewardActor"))
            os.kill(min(before), number)

        new = lambda _: bool(before and set(titled("ray::RewardActor")) - before)  # noqa: E731
        row = disturbed(backend, fault, whole, f"{number.name} of a reward worker", new)
    check(row, table)
    assert len(before) == 2
    assert not math.isnan(row.seen_s)


@pytest.mark.parametrize("kind", ["Flipping", "Stale", "Behind", "Elsewhere"])
def test_weights_that_are_not_those_announced(nodes, whole, table, tmp_path, kind):
    import faulty_workers

    from rlfusion.rollout.ray_worker import actor_of

    recipe = make_recipe("named", tmp_path / "weights")
    with make_backend(recipe, Settings(workers=2, limits=LIMITS)) as backend:
        ray.cloudpickle.register_pickle_by_value(faulty_workers)  # the workers do not find it
        backend._actor = actor_of(getattr(faulty_workers, kind), backend.settings)
        row = disturbed(backend, lambda: None, whole, f"{kind.lower()} weights on one worker")
    check(row, table)
    assert list(tmp_path.glob("weights.*"))  # it did go wrong


def test_two_runs_on_one_cluster(nodes, whole, table):
    found: list[Trained] = []

    def run(policy: Policy) -> None:
        with make_backend(make_recipe(), Settings(workers=1, limits=LIMITS)) as backend:
            found.append(trained(backend, policy=policy))

    threads = [threading.Thread(target=run, args=(make_policy(1),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.digest for one in found] == [whole.digest] * 2
    longest = max(one.seconds for one in found)
    table.append(Row("two runs on one cluster", math.nan, max(0.0, longest - whole.seconds), 0, True))


def test_a_backend_that_joins_answers_as_they_come_would_be_seen(whole, monkeypatch):
    """Planted: trajectories in the order of completion, reversed here, are other weights."""
    from rlfusion.rollout.local import Local

    kept = Local._run
    monkeypatch.setattr(Local, "_run", lambda self, items, weights: kept(self, items, weights)[::-1])
    with make_backend(make_recipe(), Settings()) as local:
        assert trained(local).digest != whole.digest


def test_a_worker_that_does_not_check_the_version_would_be_seen(whole, monkeypatch):
    """Planted: walks of the version before, taken for those of this one."""
    from rlfusion.rollout.local import Local

    kept = Local.submit

    def stale(self, items, weights):
        self.before = getattr(self, "now", weights)
        self.now = weights
        return kept(self, items, Weights(weights.version, self.before.sha256, self.before.blob))

    monkeypatch.setattr(Local, "submit", stale)
    with make_backend(make_recipe(), Settings()) as local:
        assert trained(local).digest != whole.digest


def test_at_last_a_node_leaves_and_another_joins(nodes, whole, table, tmp_path):
    with pool("slower", tmp_path / "ran") as backend:

        def fault() -> None:
            node = next(iter(nodes.cluster.worker_nodes))
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            nodes.join()

        row = disturbed(backend, fault, whole, "SIGKILL of a raylet; another node joins")
    check(row, table)
    assert not math.isnan(row.seen_s)
    joined = [node for node in ray.nodes() if node["Resources"].get("CPU") or not node["Alive"]]
    assert len(joined) == 3, "no node joined"
