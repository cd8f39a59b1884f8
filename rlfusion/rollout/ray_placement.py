"""Asks a Ray cluster whether it has a place for all processes of a run, before anything is loaded."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlfusion.rollout.backend import Settings
from rlfusion.rollout.placement import GPU, MEMORY, DoesNotFit, Node, Placement, Role, private, require_place
from rlfusion.rollout.placement_table import Driver, table
from rlfusion.rollout.together import Placing, colocated
from rlfusion.training.devices import memory_of

POLL_S, RESERVED_S = 2.0, 60.0
NODE = "ray.io/node-id"
GIB = 2**30
KIND = "accelerator_type:"
GPU_GIB: Mapping[str, int] = {
    "T4": 16, "L4": 24, "A10G": 24, "A10": 24, "L40": 48, "L40S": 48, "V100": 32, "A100": 80, "A100-40G": 40,
    "A100-80G": 80, "H100": 80, "H200": 141, "B200": 192,
}  # fmt: skip
"""Memory of the GPUs that Ray tells the kind of; of a kind that comes with several the most."""


def nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to, and what is free of each."""
    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    held = [(n["NodeManagerHostname"], n["Resources"], n["NodeID"]) for n in alive]
    return [Node(name, total, free.get(id, total), gpu_memory(total), id) for name, total, id in held]


def gpu_memory(resources: Mapping[str, float]) -> int:
    """Bytes of each GPU of a node with these resources, which name its kind; 0 where that is not known."""
    kinds = [name.removeprefix(KIND) for name in resources if name.startswith(KIND)]
    return GPU_GIB.get(kinds[0], 0) * GIB if len(kinds) == 1 else 0


def this_machine(roles: Sequence[Role]) -> Node:
    """What a private cluster has for ``roles``: as many cores as they ask for, and the GPUs and the memory of this
    machine.
    """
    cpus, _ = private(roles)
    held = {"CPU": float(cpus), GPU: float(torch.cuda.device_count()), MEMORY: float(memory_of("cpu"))}
    return Node("this machine", held, held, memory_of("cuda"))


def in_actor() -> bool:
    """Whether this process is an actor of a run, whose roles are placed by its driver."""
    return ray.is_initialized() and bool(ray.get_runtime_context().get_actor_id())


@contextmanager
def together(settings: Settings, roles: Sequence[Role], driver: Driver, say: Callable[[str], None]) -> Iterator[None]:
    """As ``placed``, of which the first role is that of the ranks: within the context what ``settings.placing`` says of
    ranks and workers holds, for those who ask ``of_rank`` and ``of_worker``.

    Raises:
        DoesNotFit: what is missing, in a line.
        ConfigError: what cannot be placed together.
    """
    ranks, workers, *others = roles
    if settings.placing == "any":
        placed(settings, roles, driver, say)
        yield
        return
    both = colocated(ranks, workers) if settings.placing == "colocated" else ranks
    wanted = [both, *others] if settings.placing == "colocated" else roles
    placed(settings, wanted, driver, say)
    group = placement_group([both.each] * both.count, "PACK", name=_group_name())
    try:
        if not group.wait(RESERVED_S):
            raise DoesNotFit(f"the place of {both.count} {both.name} was taken by others meanwhile: wait, or end them")
        if settings.placing == "apart":
            taken = _nodes_of(group)
            _require_apart([node for node in nodes() if node.id not in taken], workers)
        yield
    finally:
        remove_placement_group(group)


def _require_apart(left: Sequence[Node], workers: Role) -> None:
    try:
        require_place(left, [workers])
    except DoesNotFit as error:
        raise DoesNotFit(f"ray.placement = apart, beside the nodes of the ranks: {error}") from error


def _group_name() -> str:
    """One a run: of the Ray job that its driver is."""
    return f"rlfusion-{ray.get_runtime_context().get_job_id()}"


def _nodes_of(group: PlacementGroup) -> list[str]:
    """The nodes of a group's bundles, by Ray's ids."""
    return sorted(set(placement_group_table(group)["bundles_to_node_id"].values()))


def of_rank(placing: Placing, rank: int) -> dict[str, Any]:
    """The options of the actor of a rank."""
    if placing == "any":
        return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(get_placement_group(_group_name()), rank)}


def of_worker(placing: Placing) -> dict[str, Any]:
    """The options of the actor of a worker."""
    if placing == "any":
        return {}
    group = get_placement_group(_group_name())
    if placing == "colocated":
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
    return {"label_selector": {NODE: f"!in({','.join(_nodes_of(group))})"}}


def placed(
    settings: Settings,
    roles: Sequence[Role],
    driver: Driver,
    say: Callable[[str], None],
    look: Callable[[], list[Node]] = nodes,
) -> None:
    """Find a place for all ``roles``, and ``say`` their table. While they have none and ``settings.wait_s`` lasts,
    nodes may join, and an autoscaler is asked for them.

    Raises:
        DoesNotFit: what is missing, in a line.
    """
    driver.require_room()
    found = awaited(settings, roles, say, look) if settings.address else require_place([this_machine(roles)], roles)
    say("\n  ".join(["placement:", *table(found, driver)]))


def awaited(
    settings: Settings, roles: Sequence[Role], say: Callable[[str], None], look: Callable[[], list[Node]] = nodes
) -> Placement:
    """A place for all ``roles`` on a cluster, where nodes may join within ``settings.wait_s``.

    Raises:
        DoesNotFit: what is missing, in a line.
    """
    deadline, told = time.monotonic() + settings.wait_s, False
    while True:
        try:
            return require_place(look(), roles)
        except DoesNotFit as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                say(f"{error}; waiting up to ray.wait_s = {settings.wait_s:g} s for nodes")
                request_resources(bundles=[role.each for role in roles for _ in range(role.count)])
            told = True
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
