"""The Ray backend against the in-process one: equal bits, real kills, real hangs. One private cluster for all."""

import os
import re
import secrets
import signal
import stat
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import LOOPBACK, listening
from rollout_tasks import CLASSES, assert_identical, make_policy, make_recipe

from rlfusion.common.weights import Weights, WeightsError
from rlfusion.rewards import RewardError
from rlfusion.rollout import Keep, Limits, RolloutError, Settings, make_backend, plan, ray_address, ray_folders
from rlfusion.rollout.bundle import Bundle, Raised
from rlfusion.rollout.commands import TwinsDiffer
from rlfusion.rollout.wire import states_of

pytestmark = pytest.mark.alone

ray = pytest.importorskip("ray")
ray_backend = pytest.importorskip("rlfusion.rollout.ray_backend")
ray_cluster = pytest.importorskip("rlfusion.rollout.ray_cluster")

LIMITS = Limits(item_s=30, item_floor_s=30, start_s=90)


@pytest.fixture(scope="module", autouse=True)
def private_cluster():
    with ray_cluster.cluster(Settings(), cpus=4):
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def items(version: int = 1, size: int = 2, iteration: int = 0):
    return plan(7, iteration, 3, 4, size, CLASSES, version)


def ray_settings(workers: int, limits: Limits = LIMITS) -> Settings:
    return Settings(workers=workers, limits=limits)


def assert_equals_local(trajectories, work, weights) -> None:
    with make_backend(make_recipe(), Settings()) as local:
        expected = local.collect(work, weights)
    assert len(trajectories) == len(expected)
    for a, b in zip(trajectories, expected):
        assert_identical(a, b)


@pytest.fixture(scope="module")
def pair():
    """Two workers that tests share, because starting one takes seconds."""
    with make_backend(make_recipe(), ray_settings(2)) as backend:
        yield backend


def test_one_worker_gives_the_bits_of_none():
    with make_backend(make_recipe(), ray_settings(1)) as backend:
        assert_bits_of_local(backend)


def test_two_workers_give_the_bits_of_none(pair):
    assert_bits_of_local(pair)


def assert_bits_of_local(backend) -> None:
    for version in (1, 2):
        weights = Weights.of(make_policy(seed=version), version)
        assert_equals_local(backend.collect(items(version), weights), items(version), weights)


def test_submissions_overlap_with_the_caller_and_keep_their_own_weights(tmp_path):
    old, new = Weights.of(make_policy(seed=1), 1), Weights.of(make_policy(seed=2), 2)
    with make_backend(make_recipe("slow", tmp_path / "ran"), ray_settings(2)) as backend:
        first, second = backend.submit(items(1), old), backend.submit(items(2), new)
        deadline = time.monotonic() + 150
        while not list(tmp_path.iterdir()):
            assert time.monotonic() < deadline, "nothing ran before the result was asked for"
            time.sleep(0.05)
        later = second()
        assert_equals_local(first(), items(1), old)
        assert_equals_local(later, items(2), new)
        assert len(list(tmp_path.iterdir())) == 2  # both workers took part


def test_a_worker_that_hangs_is_killed_and_its_item_done_by_another(tmp_path):
    weights, marker = Weights.of(make_policy(), 1), tmp_path / "stopped"
    limits = Limits(item_s=4, item_floor_s=4, twin_times=0, start_s=90)
    keep = Keep(tmp_path / "run" / "failed", "mine", ())
    with make_backend(make_recipe("stop", marker), ray_settings(2, limits), keep) as backend:
        assert_equals_local(backend.collect(items(), weights), items(), weights)
        assert_gone(int(marker.read_text()))
        stacks = "".join(file.read_text() for file in (tmp_path / "run" / "stacks").iterdir())
        assert re.search(r"\nworker \d\nno answer within 2 s: ", stacks)
        assert_equals_local(backend.collect(items(iteration=1), weights), items(iteration=1), weights)


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"the stopped worker {pid} is still there"
        time.sleep(0.1)


def test_workers_killed_from_outside_at_random_times_change_no_bit(tmp_path):
    weights, work, killed = Weights.of(make_policy(), 1), items(size=1), []

    def kill_two() -> None:
        deadline = time.monotonic() + 60
        while len(killed) < 2 and time.monotonic() < deadline:
            pids = [int(path.suffix[1:]) for path in tmp_path.iterdir()]
            for pid in [pid for pid in pids if pid not in killed][:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.3)

    killer = threading.Thread(target=kill_two)
    killer.start()
    with make_backend(make_recipe("slow", tmp_path / "ran"), ray_settings(2)) as backend:
        trajectories = backend.collect(work, weights)
    killer.join()
    assert len(killed) == 2
    assert_equals_local(trajectories, work, weights)


def test_an_item_that_always_kills_its_worker_ends_the_run_by_name():
    limits = Limits(item_s=30, item_floor_s=30, start_s=90, crashes=2)
    with (
        make_backend(make_recipe("die"), ray_settings(1, limits)) as backend,
        pytest.raises(RolloutError, match=r"item 0 of iteration 0 .*: its worker died") as caught,
    ):
        backend.collect(items(), Weights.of(make_policy(), 1))
    assert caught.value.__notes__ == ["on each of the Ray workers 0, 1: ray.limits.crashes = 2 is spent"]


def test_an_error_of_the_reward_arrives_with_its_names_and_its_item_is_kept(tmp_path):
    """The pool goes on: another submission fails by itself."""
    keep, weights = Keep(tmp_path, "mine", ("a", "b", "c")), Weights.of(make_policy(), 1)
    limits = Limits(item_s=30, item_floor_s=30, start_s=90, crashes=2)
    with make_backend(make_recipe("nan"), ray_settings(2, limits), keep) as backend:
        pending = [backend.submit(items(iteration=n)[:1], weights) for n in range(2)]
        for n, wait in enumerate(pending):
            with pytest.raises(RewardError) as caught:
                wait()
            folder = tmp_path / f"iteration-{n}-item-0"
            notes = "; ".join(caught.value.__notes__)
            assert "brightness" in str(caught.value)
            assert f"item 0 of iteration {n}" in notes
            assert re.search(r"on each of the Ray workers \d, \d: ray.limits.crashes = 2 is spent", notes)
            assert notes.endswith(f"it is kept: rlfusion reproduce {folder}")
            bundle = Bundle.read(folder)
            assert (bundle.run, bundle.item, bundle.error.text) == ("mine", items(iteration=n)[0], str(caught.value))
            with pytest.raises(RewardError) as again:
                bundle.run_again("cpu")
            assert Raised.of(again.value) == bundle.error


def test_an_item_that_fails_on_one_worker_alone_is_done_by_another(tmp_path):
    weights = Weights.of(make_policy(), 1)
    with make_backend(make_recipe("once", tmp_path / "failed"), ray_settings(2)) as backend:
        assert_equals_local(backend.collect(items(), weights), items(), weights)
    assert (tmp_path / "failed").exists()


def test_a_slow_item_is_done_by_a_twin_and_its_bits_are_compared(tmp_path):
    """The first worker to come there waits in its first item, until both others of its kind are long done."""
    weights, limits = Weights.of(make_policy(), 1), Limits(item_s=60, item_floor_s=60, start_s=90, twin_times=5)
    keep = Keep(tmp_path / "run" / "failed", "mine", ())
    with make_backend(make_recipe("wait", tmp_path / "waits"), ray_settings(2, limits), keep) as backend:
        assert_equals_local(backend.collect(items(size=1), weights), items(size=1), weights)
        assert backend._scheduler.twins >= 1
        stacks = "".join(file.read_text() for file in (tmp_path / "run" / "stacks").iterdir())
        assert re.search(r"\nworker \d\n", stacks)
        assert "in misbehave" in stacks, "it is the thread of the item that is seen"
        (tmp_path / "waits").unlink()  # now it answers, too
        assert_equals_local(backend.collect(items(iteration=1), weights), items(iteration=1), weights)


def test_twins_that_differ_end_the_run_and_are_named(tmp_path):
    weights, limits = Weights.of(make_policy(), 1), Limits(item_s=60, item_floor_s=60, start_s=90, twin_times=5)
    with make_backend(make_recipe("differ", tmp_path / "waits"), ray_settings(2, limits)) as backend:
        backend.collect(items(size=1), weights)
        (tmp_path / "waits").unlink()

        def until_it_answers() -> None:
            for n in range(1, 100):
                backend.collect(items(iteration=n, size=1), weights)

        with pytest.raises(TwinsDiffer, match=r"item \d+ of iteration 0 .*: workers \d and \d gave different answers"):
            until_it_answers()


def test_walks_may_stay_where_they_were_drawn_and_only_what_is_small_comes(pair):
    weights = Weights.of(make_policy(), 1)
    whole = pair.collect(items(), weights)
    pair.moved()
    away = pair.submit_apart(items(), weights)()
    assert pair.moved()["answers_from_workers"] > 0
    for (head, sha256, where), expected in zip(away, whole, strict=True):
        assert len(head.x) == 0
        states = ray.get(where)
        rows = torch.arange(len(head))
        assert_identical(replace(head, x=states_of(states, sha256, head, rows)), expected)
        assert torch.equal(states_of(states, sha256, head, rows[1:]), expected.x[1:])
        damaged = states.copy()
        damaged[0, 3] ^= 4
        with pytest.raises(RolloutError, match=r"walks of weights 1: SHA-256 \w+, expected " + sha256):
            states_of(damaged, sha256, head, rows)


def test_the_bytes_of_weights_are_counted_once_a_worker_and_version(pair):
    pair.moved()
    weights = Weights.of(make_policy(seed=9), 7)
    for _ in range(2):
        pair.collect(items(version=7), weights)
    moved = pair.moved()
    assert moved["weights_to_workers"] in (len(weights.blob), 2 * len(weights.blob))
    assert pair.moved() == {}


def test_a_task_that_cannot_be_built_ends_the_run_with_its_own_error():
    with (
        make_backend(make_recipe("build"), ray_settings(1)) as backend,
        pytest.raises(FileNotFoundError, match=r"no such model: base\.safetensors"),
    ):
        backend.collect(items(), Weights.of(make_policy(), 1))


def test_wrong_weights_are_refused_on_either_side_and_the_pool_goes_on(pair):
    good = Weights.of(make_policy(), 1)
    damaged = Weights(1, secrets.token_hex(32), good.blob)
    with pytest.raises(WeightsError, match="got weights of version 1"):
        pair.submit(items(version=2), good)
    with pytest.raises(WeightsError, match=f"expected {damaged.sha256}"):
        pair.collect(items(), damaged)
    assert_equals_local(pair.collect(items(), good), items(), good)


def test_a_worker_checks_the_version_of_its_item_itself():
    worker = ray_backend.Worker()
    recipe = make_recipe()
    worker.build("mine", (recipe.builder, recipe.text), {}, [], 1, {})
    with pytest.raises(WeightsError, match="got weights of version 3"):
        worker.run(items(version=2)[0].to_json(), ("mine", 3, ""), [])
    with pytest.raises(WeightsError, match=r"is of run 'other', expected items of run 'mine'"):
        worker.run(items(version=2)[0].to_json(), ("other", 2, ""), [])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Behind", r"run '(mine-\w+)', version 1, .*, expected run '\1', version 2, "),
        ("Elsewhere", r"run 'another-mine"),
    ],
)
def test_an_answer_of_other_weights_or_another_run_is_refused_and_done_again(kind, said, tmp_path, caplog):
    import faulty_workers

    backend = make_backend(make_recipe("named", tmp_path / "marks"), ray_settings(1), Keep(tmp_path, "mine", ()))
    with backend:
        ray.cloudpickle.register_pickle_by_value(faulty_workers)  # the workers do not find it
        backend._actor = ray_backend.actor_of(getattr(faulty_workers, kind), backend.settings)
        for version in (1, 2):
            weights = Weights.of(make_policy(seed=version), version)
            assert_equals_local(backend.collect(items(version), weights), items(version), weights)
    assert re.search(rf"worker 0 answered for {said}.*it is killed, and what it did is done again", caplog.text)
    assert len(list(tmp_path.iterdir())) == 1, "it went wrong once, and no item was kept"


def test_a_pool_that_cannot_be_placed_says_what_it_waited_for():
    settings = Settings(workers=1, cpus_per_worker=1000, limits=Limits(start_s=1, preemptions=1))
    with (
        make_backend(make_recipe(), settings) as backend,
        pytest.raises(RolloutError, match=r"not ready within .* = 1 s"),
    ):
        backend.collect(items(), Weights.of(make_policy(), 1))


def test_a_closed_backend_takes_no_work_and_closes_again():
    backend = make_backend(make_recipe(), ray_settings(1))
    backend.close()
    backend.close()
    with pytest.raises(RolloutError, match="closed"):
        backend.submit(items(), Weights.of(make_policy(), 1))


def test_closing_stops_what_runs(tmp_path):
    backend = make_backend(make_recipe("stop", tmp_path / "stopped"), ray_settings(1))
    pending = backend.submit(items(), Weights.of(make_policy(), 1))
    while not (tmp_path / "stopped").exists():
        time.sleep(0.05)
    backend.close()
    with pytest.raises(RolloutError, match="closed"):
        pending()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_a_private_cluster_listens_on_the_loopback_alone(pair):
    pair.collect(items(), Weights.of(make_policy(), 1))
    addresses = listening()
    assert len(addresses) >= 5  # the control store, the raylet, the agent, the workers, the driver
    assert set(addresses) <= LOOPBACK


def test_a_private_cluster_asks_for_a_token_that_only_its_owner_can_read():
    from ray._raylet import AuthenticationMode, get_authentication_mode

    assert get_authentication_mode() == AuthenticationMode.TOKEN
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64


def test_connecting_leaves_the_callers_signal_handler_alone():
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_worker_that_cannot_import_its_class_is_named_at_once_by_its_own_error():
    """As on a node without rlfusion: the class is found by name, in a module that is nowhere but here."""
    here = types.ModuleType("only_in_the_driver")
    here.Worker = type("Worker", (), dict.fromkeys(("where", "build", "run"), lambda self, *given: {}))
    here.Worker.__module__, sys.modules[here.__name__] = here.__name__, here
    try:
        with make_backend(make_recipe(), ray_settings(2)) as backend:
            backend._actor = ray.remote(max_restarts=0)(here.Worker)
            said = (
                r"Ray worker \d cannot start: ModuleNotFoundError: No module named 'only_in_the_driver'; .* every node"
            )
            with pytest.raises(RolloutError, match=said) as caught:
                backend.collect(items(), Weights.of(make_policy(), 1))
        assert caught.value.exit_code == 69
    finally:
        del sys.modules[here.__name__]


def test_an_address_where_a_cluster_answers_is_found_good():
    address = ray.get_runtime_context().gcs_address
    ray_address.require_cluster(address, 90.0)
    assert address in ray_address._answered


def test_the_folder_of_a_private_cluster_says_whose_it_is():
    folder = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
    assert (folder / "owner").read_text() == f"{os.getpid()}\n"
    assert folder not in ray_folders.sweep()
    assert (folder / "token").exists()
