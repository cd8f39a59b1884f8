"""Asks a Ray cluster whether it has a place for all processes of a run, before anything is loaded."""

import time
from collections.abc import Callable, Sequence

import ray
import torch
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources

from rlfusion.rollout.backend import Settings
from rlfusion.rollout.placement import DoesNotFit, Node, Role, line, private, require_place

POLL_S = 2.0


def nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to, and what is free of each."""
    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(n["NodeManagerHostname"], n["Resources"], free.get(n["NodeID"], n["Resources"])) for n in alive]


def this_machine(roles: Sequence[Role]) -> Node:
    """What a private cluster has for ``roles``: as many cores as they ask for, and the GPUs of this machine."""
    cpus, _ = private(roles)
    held = {"CPU": float(cpus), "GPU": float(torch.cuda.device_count())}
    return Node("this machine", held, held)


def placed(
    settings: Settings,
    roles: Sequence[Role],
    say: Callable[[str], None],
    look: Callable[[], list[Node]] = nodes,
) -> str:
    """The table of ``roles`` in a line, all of which have a place; "" within an actor, for whose run they were placed.
    While they have none and ``settings.wait_s`` lasts, nodes may join, and an autoscaler is asked for them.

    Raises:
        DoesNotFit: what is missing, in a line.
    """
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id():
        return ""
    if not settings.address:
        return line(require_place([this_machine(roles)], roles))
    deadline, told = time.monotonic() + settings.wait_s, False
    while True:
        try:
            return line(require_place(look(), roles))
        except DoesNotFit as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                say(f"{error}; waiting up to ray.wait_s = {settings.wait_s:g} s for nodes")
                request_resources(bundles=[role.each for role in roles for _ in range(role.count)])
            told = True
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
