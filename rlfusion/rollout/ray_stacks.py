"""Where the threads of Ray's actors stand: asked beside their work, of the processes that do it."""

import faulthandler
import tempfile
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from rlfusion.rollout.ray_cluster import first_line

BESIDE = "beside"
"""The concurrency group in which an actor answers while it works."""
GRACE_S = 2.0


def here() -> str:
    """Where each thread of this process stands."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode()


def stacks_of(actors: Mapping[int, Any]) -> dict[int, str]:
    """What each actor's ``stacks`` says, by number; of one that does not answer within ``GRACE_S``, that."""
    calls = {number: actor.stacks.options(concurrency_group=BESIDE).remote() for number, actor in actors.items()}
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=GRACE_S)
    found = {}
    for number, call in calls.items():
        try:
            found[number] = ray.get(call, timeout=0)
        except (RayError, GetTimeoutError) as error:
            found[number] = f"no answer within {GRACE_S:g} s: {first_line(error)}\n"
    return found
