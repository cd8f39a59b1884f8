"""Ranks and workers on one GPU, or on other nodes: what they reserve, and where Ray puts them. No GPU is real."""

import time

import pytest
from clusters import several

from rlfusion.common.errors import ConfigError
from rlfusion.config import Finetune, Ray, Rollout
from rlfusion.config.parts import Learners
from rlfusion.rollout import Settings
from rlfusion.rollout.placement import PROCESS, DoesNotFit, Role
from rlfusion.rollout.placement_table import Driver
from rlfusion.rollout.together import colocated

HERE = Driver("cpu", 1, PROCESS, 10**12)


def ranks(count=2, cpus=1.0, gpus=0.6, **more) -> Role:
    return Role("learner ranks", count, cpus, gpus, alone=True, **more)


def workers(count=4, cpus=0.5, gpus=0.2, **more) -> Role:
    return Role("rollout workers", count, cpus, gpus, **more)


def test_a_rank_and_its_workers_reserve_what_they_do_together():
    found = colocated(ranks(memory=30, resources={"rack": 1}), workers(memory=4, resources={"rack": 0.5}))
    assert (found.count, found.cpus, found.gpus, found.memory, found.alone) == (2, 2.0, 1.0, 38, True)
    assert found.resources == {"rack": 2.0}
    assert colocated(ranks(), workers(gpus=0.0, memory=5)).memory == 0  # they take it elsewhere
    assert colocated(ranks(gpus=1.0), workers(2, gpus=1.0)).gpus == 2.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rollout": Rollout(workers=3)}, "rollout.workers = 3 with ray.placement = colocated: .* learner.ranks = 2"),
        ({"rollout": Rollout(workers=0)}, "rollout.workers = 0 with ray.placement = colocated"),
        ({"learner": Learners()}, "learner.ranks = 0 with ray.placement = colocated"),
        ({"learner": Learners(2, 2, gpus_per_rank=1.0)}, "of a rank's workers = 1.5: expected a share of one GPU"),
    ],
)
def test_what_cannot_be_placed_together_is_refused(given, said):
    ray = Ray(placement="colocated", gpus_per_worker=0.25)
    held = {"rollout": Rollout(workers=4), "learner": Learners(2, 2, gpus_per_rank=0.5 + 0.1), "ray": ray}
    with pytest.raises(ConfigError, match=said):
        Finetune(**held | {"ray": Ray(placement="colocated", gpus_per_worker=0.25)} | given)


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_share_that_two_ranks_could_have_of_one_gpu_is_refused(share):
    with pytest.raises(ConfigError, match=r"expected whole GPUs, or a share above 0.5"):
        Learners(2, 2, gpus_per_rank=share)
    Learners(1, 1, gpus_per_rank=share)
    Learners(2, 2, gpus_per_rank=0.51)


@pytest.fixture(scope="module")
def two_gpus():
    """Two nodes of two CPUs and a GPU each."""
    with several(*[{"num_cpus": 2, "num_gpus": 1}] * 2) as held:
        yield held


class Where:
    """An actor that says where it is."""

    def place(self) -> tuple[str, list[str]]:
        import ray

        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"]


def places(settings: Settings, *roles: Role) -> list[list[tuple[str, list[str]]]]:
    """Where the ranks and the workers are."""
    import ray

    from rlfusion.rollout.ray_placement import of_rank, of_worker, together

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)  # what the last ones had is given back
    with together(settings, (*roles, Role("reward workers", 0)), HERE, print):
        found = []
        for role, options in zip(roles, (of_rank, lambda placing, _: of_worker(placing))):
            made = ray.remote(num_cpus=role.cpus, num_gpus=role.gpus)(Where)
            found.append([made.options(**options(settings.placing, n)).remote() for n in range(role.count)])
        return [ray.get([one.place.remote() for one in actors], timeout=150) for actors in found]


@pytest.mark.alone
def test_ranks_and_their_workers_share_gpus_or_are_on_other_nodes(two_gpus):
    settings = Settings(address=two_gpus.cluster.address, placing="colocated")
    of_ranks, of_workers = places(settings, ranks(), workers())
    assert len({node for node, _ in of_ranks}) == 2
    assert sorted(of_workers) == sorted([*of_ranks, *of_ranks]), "each rank has two workers on its node and its GPU"

    settings = Settings(address=two_gpus.cluster.address, placing="apart")
    of_ranks, of_workers = places(settings, ranks(gpus=0.0), workers(gpus=0.0))
    (node,) = {node for node, _ in of_ranks}
    assert {other for other, _ in of_workers}.isdisjoint({node})

    with pytest.raises(DoesNotFit, match=r"ray.placement = apart, beside the nodes of the ranks: .*on 1 node"):
        places(settings, ranks(), workers(gpus=0.0))
    with pytest.raises(DoesNotFit, match="1 of 3 learner ranks with their workers"):
        places(Settings(address="auto", placing="colocated"), ranks(3), workers(6))
