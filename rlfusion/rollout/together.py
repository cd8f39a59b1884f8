"""Whether rollout workers are beside learner ranks or apart from them, without Ray.

any         wherever there is room
colocated   each rank and its part of the workers reserve one place together, on one node; where they are shares of
            a GPU it is the same one
apart       no worker is on a node that a rank is on
"""

from dataclasses import replace
from typing import Literal

from rlfusion.common.errors import ConfigError
from rlfusion.rollout.placement import Role, require_gpus

Placing = Literal["any", "colocated", "apart"]


def colocated(ranks: Role, workers: Role) -> Role:
    """Each rank with its part of the workers as one process that reserves what they do.

    Raises:
        ConfigError: the workers are no multiple of the ranks, their GPUs are neither shares of one nor whole ones
            together, or they reserve nothing.
    """
    each, rest = divmod(workers.count, ranks.count)
    if rest:
        raise ConfigError(
            f"rollout.workers = {workers.count} with ray.placement = colocated: expected a multiple of learner.ranks = "
            f"{ranks.count}, such as {max(1, each) * ranks.count}"
        )
    gpus = round(ranks.gpus + each * workers.gpus, 4)
    require_gpus("ray.placement = colocated: learner.gpus_per_rank and ray.gpus_per_worker of a rank's workers", gpus)
    names = {*ranks.resources, *workers.resources}
    more = {name: ranks.resources.get(name, 0) + each * workers.resources.get(name, 0) for name in names}
    beside = each * workers.memory if workers.device == ranks.device else 0
    both = replace(
        ranks,
        name="learner ranks with their workers",
        cpus=ranks.cpus + each * workers.cpus,
        gpus=gpus,
        resources=more,
        memory=ranks.memory + beside,
    )
    if not both.each:
        raise ConfigError("ray.placement = colocated: expected ranks or workers that reserve cores or GPUs")
    return both


def require_both(placing: Placing, ranks: int, workers: int) -> None:
    """Refuse a place beside or apart of what is not there.

    Raises:
        ConfigError: names it.
    """
    for name, count in (("learner.ranks", ranks), ("rollout.workers", workers)):
        if placing != "any" and not count:
            raise ConfigError(f"{name} = 0 with ray.placement = {placing}: expected 1 at least, or any")
