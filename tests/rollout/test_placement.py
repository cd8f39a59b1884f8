"""Whether the processes of a run fit on a cluster: against a search of all placements, and case by case."""

import itertools
import random
import time

import pytest
import torch

from rlfusion.common.errors import ConfigError
from rlfusion.config import Ray
from rlfusion.config.parts import Learners
from rlfusion.rollout import Settings
from rlfusion.rollout.placement import (
    PROCESS,
    DoesNotFit,
    Node,
    Role,
    place,
    private,
    require_gpus,
    require_place,
)
from rlfusion.rollout.placement_table import Driver, table
from rlfusion.training.devices import require_device

GB = 10**9


def node(cpus=8.0, gpus=0.0, free=None, gpu_memory=0, **more) -> Node:
    total = {"CPU": cpus, "GPU": gpus, **more}
    return Node("n", total, total | (free or {}), gpu_memory)


def ranks(count=2, gpus=1.0, cpus=1.0, **more) -> Role:
    return Role("learner ranks", count, cpus, gpus, alone=True, **more)


def workers(count=2, gpus=0.0, cpus=1.0, **more) -> Role:
    return Role("rollout workers", count, cpus, gpus, **more)


HEAD = node(cpus=8)
"""A head node without GPU, the normal case."""

FITS = {
    "nothing is wanted": ([HEAD], [workers(0)]),
    "workers on the head's cores": ([HEAD], [workers(8)]),
    "a head without GPU, workers and ranks elsewhere": ([HEAD, node(8, 4)], [ranks(2), workers(2, 1.0)]),
    "shares of one GPU": ([node(8, 1)], [workers(4, 0.25)]),
    "shares of several": ([node(8, 2)], [workers(6, 0.3)]),
    "thirds, as Ray counts them": ([node(8, 1)], [workers(3, 0.3333)]),
    "tenths, that are not exact in binary": ([node(16, 1)], [workers(10, 0.1)]),
    "whole GPUs beside shares": ([node(8, 3)], [workers(2, 0.5), ranks(2)]),
    "two GPUs a rank": ([node(8, 4)], [ranks(2, 2.0)]),
    "a rank a node": ([node(2, 1), node(2, 1)], [ranks(2)]),
    "reward workers by a resource": ([HEAD, node(4, 0, ocr=2.0)], [Role("reward workers", 2, 0, 0, {"ocr": 1})]),
    "a rank and workers on one GPU": ([node(8, 1)], [ranks(1, 0.5), workers(2, 0.25)]),
    "what others left": ([node(8, 2, free={"GPU": 1.5})], [ranks(1, 1), workers(1, 0.5)]),
    "memory of GPUs": ([node(8, 2, gpu_memory=80 * GB)], [ranks(2, memory=79 * GB)]),
    "memory of two GPUs": ([node(8, 2, gpu_memory=80 * GB)], [ranks(1, 2.0, memory=159 * GB)]),
    "more than its share of a GPU": (
        [node(8, 1, gpu_memory=80 * GB)],
        [ranks(1, 0.5, memory=60 * GB), workers(2, 0.25, memory=10 * GB)],
    ),
    "the larger of two GPUs": (
        [node(8, 1, gpu_memory=24 * GB), node(8, 1, gpu_memory=80 * GB)],
        [workers(1, 0.5, memory=20 * GB), ranks(1, 1.0, memory=40 * GB)],
    ),
    "memory of a node": ([node(8, memory=10.0 * GB)], [workers(4, memory=2 * GB)]),
    "memory of a node that does not say": ([HEAD], [workers(1, memory=10**15)]),
    "memory of GPUs of no kind that is known": ([node(8, 1)], [ranks(1, memory=10**15)]),
    "a role of which nothing is known": ([node(8, memory=1.0)], [workers(4)]),
}

MISSING = {
    "no GPU at all": ([HEAD], [ranks(2)], r"2 of 2 learner ranks \(1 CPU, 1 GPU each\): .*2 GPU wanted, 0 free"),
    "one GPU too few": ([node(8, 2)], [ranks(2), workers(1, 1.0)], r"1 of 1 rollout workers .*3 GPU wanted, 2 "),
    "no cores": ([node(2, 4)], [ranks(2), workers(2)], "2 of 2 rollout workers .*4 CPU wanted, 2 free"),
    "shares that lie on two GPUs": ([node(8, 2)], [workers(3, 0.6)], "1 of 3 .*on no single node or GPU"),
    "a rank of two GPUs on nodes of one": ([node(8, 1), node(8, 1)], [ranks(1, 2.0)], "on no single node"),
    "two ranks on one GPU": ([node(8, 1)], [ranks(2, 0.5)], "1 of 2 learner ranks .*on no single node or GPU"),
    "no such resource": ([HEAD], [Role("reward workers", 1, 0, 0, {"ocr": 1})], r"\(1 ocr each\).*1 ocr wanted"),
    "others hold it": ([node(8, 2, free={"GPU": 0.0})], [ranks(1)], "others hold the rest, wait or end them$"),
    "it is not there": ([node(8, 0)], [ranks(1)], "on 1 node; add nodes, or ask for less$"),
    "no nodes": ([], [workers(1)], "1 CPU wanted, 0 free on 0 nodes"),
    "memory of a node": (
        [node(8, memory=4.0 * GB)],
        [workers(2, memory=2 * GB)],
        r"1 of 2 rollout workers \(1 CPU, 2.4 GB of memory each\): .*4.8 GB of memory wanted, 4 GB free",
    ),
    "memory of a GPU": (
        [node(8, 2, gpu_memory=24 * GB)],
        [ranks(2, memory=30 * GB)],
        r"2 of 2 learner ranks .*, 30 GB of GPU memory each\): .*60 GB of GPU memory wanted, 48 GB free",
    ),
    "memory of a GPU that others have a share of": (
        [node(8, 1, gpu_memory=80 * GB)],
        [ranks(1, 0.5, memory=60 * GB), workers(1, 0.5, memory=30 * GB)],
        "1 of 1 rollout workers .*90 GB of GPU memory wanted, 80 GB free",
    ),
    "memory on no node alone": (
        [node(8, memory=2.0 * GB), node(8, memory=2.0 * GB)],
        [workers(1, memory=3 * GB)],
        "on no single node or GPU",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_what_fits(case):
    nodes, roles = FITS[case]
    found = require_place(nodes, roles)
    assert [found.there(role) for role in roles] == [role.count for role in roles]


@pytest.mark.parametrize("case", MISSING)
def test_what_does_not_fit_is_one_line_of_what_is_missing(case):
    nodes, roles, said = MISSING[case]
    with pytest.raises(DoesNotFit, match=said) as error:
        require_place(nodes, roles)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 69


def fits_somehow(nodes, roles) -> bool:
    """Whether any placement of single processes fits: all of them are tried."""
    processes = [role for role in roles for _ in range(role.count)]
    gpus = [(n, g) for n, one in enumerate(nodes) for g in range(int(one.free.get("GPU", 0)))]
    places = [[(n, None) for n in range(len(nodes))] if not role.gpus else gpus for role in processes]
    for chosen in itertools.product(*places):
        cores, shares, kinds = [0.0] * len(nodes), dict.fromkeys(gpus, 0.0), []
        for role, (n, g) in zip(processes, chosen):
            cores[n] += role.cpus
            if g is not None:
                shares[n, g] += role.gpus
                kinds += [(role.name, n, g)] if role.alone else []
        if (
            all(c <= one.free["CPU"] for c, one in zip(cores, nodes))
            and all(s <= 1 + 1e-9 for s in shares.values())
            and len(kinds) == len(set(kinds))
        ):
            return True
    return False


def test_against_a_search_of_all_placements():
    draw, both = random.Random(0), set()
    for _ in range(400):
        nodes = [node(draw.randint(1, 4), draw.randint(0, 2)) for _ in range(draw.randint(1, 3))]
        roles = [
            ranks(draw.randint(0, 2), draw.choice([0, 0.5, 1]), draw.choice([1, 2])),
            workers(draw.randint(0, 3), draw.choice([0, 0.25, 0.5, 1]), draw.choice([0, 1])),
        ]
        ours, truth = not place(nodes, roles).missing, fits_somehow(nodes, roles)
        assert ours == truth, (nodes, roles)
        both.add(truth)
    assert both == {True, False}


def test_nothing_of_a_node_is_given_twice():
    draw = random.Random(1)
    for _ in range(200):
        nodes = [node(draw.randint(1, 6), draw.randint(0, 3)) for _ in range(2)]
        roles = [ranks(draw.randint(1, 3), draw.choice([0.5, 1])), workers(draw.randint(0, 6), draw.choice([0, 0.3]))]
        found = place(nodes, roles)
        for name, total in (("CPU", "cpus"), ("GPU", "gpus")):
            used = sum(found.there(role) * getattr(role, total) for role in roles)
            assert used <= sum(one.free[name] for one in nodes) + 1e-9


def test_a_thousand_workers_are_placed_at_once():
    nodes = [HEAD, *(node(64, 8) for _ in range(140))]
    begin = time.process_time()
    assert not place(nodes, [ranks(64), workers(1000, 1.0)]).missing
    assert place(nodes, [ranks(64), workers(1200, 1.0)]).missing == {"rollout workers": 144}
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("gpus", [1.5, -1, 2.25, float("nan"), float("inf")])
def test_a_number_of_gpus_that_ray_cannot_give_is_refused(gpus):
    with pytest.raises(ConfigError, match="expected a share of one GPU below 1, or a whole number"):
        require_gpus("ray.gpus_per_worker", gpus)


def test_the_table_says_what_is_wanted_and_what_is_there():
    roles = [ranks(2, 1.0, threads=2, memory=30 * GB), workers(3, 0.5), Role("reward workers", 0)]
    found = table(place([HEAD, node(8, 3, gpu_memory=80 * GB)], roles), Driver("cpu", 1, PROCESS, 16 * GB))
    assert [row.split() for row in found] == [
        ["role", "wanted", "there", "device", "CPU", "GPU", "threads", "GB", "at", "least", "GB", "there"],
        ["driver", "1", "1", "cpu", "0", "0", "1", "0.4", "16"],
        ["learner", "ranks", "2", "2", "cuda", "1", "1", "2", "30", "80"],
        ["rollout", "workers", "3", "2", "cuda", "1", "0.5", "1", "?", "80"],
    ]
    assert all(row.index("cuda") == found[0].index("device") for row in found[2:])


def test_a_private_cluster_has_room_for_all_roles():
    roles = [ranks(2, 0, 0.5), workers(3, 0.5), Role("reward workers", 1, 0, 0)]
    assert private(roles) == (4, 2)
    assert private([Role("reward workers", 1, 0, 0)]) == (1, 0)


HERE = Driver("cpu", 1, PROCESS, 16 * GB)


class Looked:
    """A cluster of which another node joins after so many looks."""

    def __init__(self, joins_at: int) -> None:
        self.looks, self.joins_at = 0, joins_at

    def __call__(self) -> list[Node]:
        self.looks += 1
        return [HEAD, *([node(8, 2)] if self.looks > self.joins_at else [])]


@pytest.fixture
def asking(monkeypatch):
    """``ray_placement.placed`` beside a cluster that is not there, and what an autoscaler is asked for."""
    from rlfusion.rollout import ray_placement

    asked = []
    monkeypatch.setattr(ray_placement, "POLL_S", 0.01)
    monkeypatch.setattr(ray_placement, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(ray_placement.ray, "is_initialized", lambda: False)
    return ray_placement, asked


def test_nodes_that_join_are_waited_for_and_asked_for(asking):
    ray_placement, asked = asking
    told, looked, roles = [], Looked(3), [ranks(2), workers(1, 0.5, 0.0)]
    with pytest.raises(DoesNotFit):
        ray_placement.placed(Settings(address="auto"), roles, HERE, told.append, Looked(3))
    assert (asked, told) == ([], []), "without wait_s nothing is waited for"
    roles = [ranks(2), workers(1, 0.0)]
    ray_placement.placed(Settings(address="auto", wait_s=20.0), roles, HERE, told.append, looked)
    assert [row.split()[:4] for row in told.pop().splitlines()[3:]] == [
        ["learner", "ranks", "2", "2"],
        ["rollout", "workers", "1", "1"],
    ]
    assert looked.looks == 4
    assert asked == [[{"CPU": 1.0, "GPU": 1.0}] * 2 + [{"CPU": 1.0}]]
    assert len(told) == 1
    assert "2 GPU wanted, 0 free" in told[0]
    with pytest.raises(DoesNotFit, match="2 GPU wanted, 0 free"):
        ray_placement.placed(Settings(address="auto", wait_s=0.05), roles, HERE, told.append, Looked(10**9))


def test_a_private_cluster_has_the_gpus_of_its_machine_and_no_resources_of_others(asking, monkeypatch):
    ray_placement, _ = asking
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ray_placement, "memory_of", {"cpu": 64 * GB, "cuda": 24 * GB}.get)
    told = []
    place = lambda *roles: ray_placement.placed(Settings(), roles, HERE, told.append)  # noqa: E731
    place(workers(200))
    assert told.pop().splitlines()[-1].split()[:4] == ["rollout", "workers", "200", "200"]
    place(workers(2, 0.5), Role("reward workers", 0, 0))
    assert told.pop().splitlines()[-1].split()[-1] == "24"
    with pytest.raises(DoesNotFit, match="2 GPU wanted, 1 free"):
        place(workers(2, 1.0))
    with pytest.raises(DoesNotFit, match="1 ocr wanted, 0 free"):
        place(workers(1, resources={"ocr": 1}))


def test_a_driver_that_does_not_fit_is_refused(asking):
    ray_placement, _ = asking
    with pytest.raises(DoesNotFit, match="takes 30 GB of memory of its device 'cuda' at least, and 24 GB are there"):
        ray_placement.placed(Settings(), [workers(1)], Driver("cuda", 1, 30 * GB, 24 * GB), print)


def test_the_kind_of_a_gpu_says_its_memory_where_that_is_known(asking):
    ray_placement, _ = asking
    assert ray_placement.gpu_memory({"GPU": 8.0, "accelerator_type:H200": 1.0}) == 141 * 2**30
    assert ray_placement.gpu_memory({"GPU": 8.0, "accelerator_type:NEWEST": 1.0}) == 0
    assert ray_placement.gpu_memory({"CPU": 8.0}) == 0


@pytest.mark.parametrize(
    ("gpus", "learner", "device"),
    [(1.0, "cpu", "cuda"), (0.25, "cuda", "cuda"), (0.0, "cuda", "cpu"), (0.0, "cpu", "cpu"), (0.0, "mps", "mps")],
)
def test_a_worker_works_on_what_it_reserves_whatever_the_learner_has(gpus, learner, device):
    ray = Ray(gpus_per_worker=gpus)
    assert ray.settings(2, 1, "auto").worker_device(learner) == device
    assert ray.settings(2, 1, "auto").worker_device(f"{learner}:3") == device
    assert ray.settings(0, 1, "auto").worker_device("cuda:1") == "cuda:1"


def test_the_settings_of_each_role_arrive():
    held = {"resources_per_worker": {"rack": 0.5}, "resources_per_reward": {"ocr": 1.0}, "cpus_per_reward": 2.0}
    held |= {"workers_per_reward": 3, "threads_per_reward": 2}
    ray = Ray(gpus_per_worker=0.5, threads_per_worker=3, reward_envs={"a": {}, "b": {}}, wait_s=7.0, **held)
    settings = ray.settings(4, 1, "auto")
    assert settings.roles == (
        Role("rollout workers", 4, 1.0, 0.5, {"rack": 0.5}, threads=3),
        Role("reward workers", 6, 2.0, 0.0, {"ocr": 1.0}, threads=2),
    )
    assert (settings.threads, settings.wait_s) == (3, 7.0)
    assert ray.settings(0, 1, "auto").threads == 1, "in this process they are the run's"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Ray(gpus_per_worker=1.5), r"ray.gpus_per_worker = 1.5"),
        (lambda: Ray(gpus_per_reward=2.5), r"ray.gpus_per_reward = 2.5"),
        (lambda: Ray(resources_per_worker={"GPU": 1}), "GPU has settings of its own"),
        (lambda: Ray(resources_per_reward={"ocr": 0}), "{ocr: 0}: expected a number above 0"),
        (lambda: Ray(wait_s=-1), "wait_s = -1"),
        (lambda: Ray(threads_per_worker=-1), "threads_per_worker = -1"),
        (lambda: Learners(1, gpus_per_rank=1.5), r"learner.gpus_per_rank = 1.5"),
        (
            lambda: Learners(2, 2, gpus_per_rank=0.5),
            "expected whole GPUs, or a share above 0.5, as no two ranks share one",
        ),
        (lambda: Learners(1, resources_per_rank={"CPU": 2}), "CPU has settings of its own"),
    ],
)
def test_what_no_process_can_reserve_is_refused(made, said):
    with pytest.raises(ConfigError, match=said):
        made()


@pytest.mark.parametrize("device", ["cuad", "cuda:x", "auto:1", "gpu", ""])
def test_a_head_without_a_gpu_still_refuses_what_is_no_device(device):
    require_device("cuda")
    require_device("cuda:7")
    with pytest.raises(ConfigError, match="device = "):
        require_device(device)
