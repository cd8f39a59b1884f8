"""The table of the processes of a run: how many of each role are wanted and there, and what each has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlfusion.rollout.placement import GPU, GPU_MEMORY, MEMORY, DoesNotFit, Node, Placement, Role

HEADER = ("role", "wanted", "there", "device", "CPU", "GPU", "threads", "GB at least", "GB there")


@dataclass(frozen=True)
class Driver:
    """This process, which no cluster places: its device and threads, the bytes that it takes at least of its device's
    memory, 0 where that is not known, and what there is of it.
    """

    device: str
    threads: int
    memory: int
    there: int

    def require_room(self) -> None:
        """Raises DoesNotFit where it takes more memory than there is."""
        if self.there and self.memory > self.there:
            raise DoesNotFit(
                f"this process takes {self.memory / 1e9:.3g} GB of memory of its device {self.device!r} at least, and "
                f"{self.there / 1e9:.3g} GB are there; expected another device, a smaller model, or learner.ranks and "
                "learner.shard = fsdp"
            )


def table(found: Placement, driver: Driver) -> list[str]:
    """The roles that have processes, a line each below a header: how many are wanted and there, and what each has."""
    own = ("driver", "1", "1", driver.device, "0", "0", f"{driver.threads}", _gb(driver.memory), _gb(driver.there))
    rows = [HEADER, own, *(_row(found, role) for role in found.roles if role.count)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def _row(found: Placement, role: Role) -> tuple[str, ...]:
    """Of one role. Where nothing is known of memory there is a question mark."""
    memory, most = role.bytes.get(GPU_MEMORY if role.gpus else MEMORY, 0), _most(found.nodes, role)
    more = "".join(f", {n:g} {name}" for name, n in role.resources.items())
    counts = (f"{role.count}", f"{found.there(role)}")
    each = (role.device, f"{role.cpus:g}", f"{role.gpus:g}", f"{role.threads}")
    return role.name + more, *counts, *each, _gb(memory), _gb(most)


def _gb(n: float) -> str:
    return f"{n / 1e9:.3g}" if 0 < n < math.inf else "?"


def _most(nodes: Sequence[Node], role: Role) -> float:
    """The most bytes that one of a role can have: of the GPUs that it reserves, or of a node."""
    if role.gpus:
        return max((n.gpu_memory * max(1.0, role.gpus) for n in nodes if n.free.get(GPU, 0)), default=0)
    return max((node.free.get(MEMORY, math.inf) for node in nodes), default=0)
