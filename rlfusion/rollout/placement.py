"""Whether the processes of a run fit on a cluster together: asked before anything is loaded, without Ray.

A ``Role`` is so many equal processes, a ``Node`` what is free of a machine. As for Ray, a share of a GPU is a share of
one GPU, and from one on GPUs are whole ones. Memory, of which Ray knows nothing, is that of the GPUs that a process
reserves, by whatever shares, and else of its node; where a node does not say what it has, any amount is there. What is
hardest to place is placed first, each process where the least is left over; where that does not place all, other ways
are tried.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlfusion.common.errors import ConfigError, UnavailableError

CPU, GPU, MEMORY, GPU_MEMORY = "CPU", "GPU", "memory", "GPU memory"
OWN = (CPU, GPU, MEMORY, "object_store_memory")
PROCESS = 400_000_000
"""Bytes of a node's memory that any process with torch takes, whatever it does."""
EXACT = 10_000
"""Ray counts resources in such parts of one."""
SEARCHED, TRIES = 200, 5_000
"""Where so few processes are placed, so many placements of one are tried after a first pass that moves none again."""


class DoesNotFit(UnavailableError):
    """The roles of a run do not fit on the cluster together."""


@dataclass(frozen=True)
class Role:
    """So many equal processes, and what each reserves.

    Attributes:
        name: in the plural, as tables show it.
        count: how many; 0 where there are none.
        cpus: CPU cores of each.
        gpus: GPUs of each: a share below 1, or whole ones.
        resources: Ray's custom resources of each, by name.
        alone: no two of them may share a GPU.
        threads: torch threads of each.
        memory: bytes that each takes at least of its GPUs, or of its node where it has none, beside ``PROCESS``; 0
            where nothing is known of it.
    """

    name: str
    count: int
    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    alone: bool = False
    threads: int = 1
    memory: int = 0

    def __post_init__(self) -> None:
        require_gpus(self.name, self.gpus)

    @property
    def each(self) -> dict[str, float]:
        """What one reserves, by the names of Ray."""
        return {name: n for name, n in {CPU: self.cpus, GPU: self.gpus, **self.resources}.items() if n > 0}

    @property
    def device(self) -> str:
        """What each works on: what it reserves."""
        return "cuda" if self.gpus else "cpu"

    @property
    def bytes(self) -> dict[str, int]:
        """Memory that one takes at least, of its node and of its GPUs; nothing where nothing is known of it."""
        if not self.memory:
            return {}
        return {MEMORY: PROCESS, GPU_MEMORY: self.memory} if self.gpus else {MEMORY: PROCESS + self.memory}


def require_gpus(name: str, gpus: float) -> None:
    """Refuse a number of GPUs that Ray cannot give: they are shared below 1, and whole from 1 on.

    Raises:
        ConfigError: such a number.
    """
    if not (0 <= gpus < 1 or (1 <= gpus < math.inf and gpus == int(gpus))):
        raise ConfigError(f"{name} = {gpus:g}: expected a share of one GPU below 1, or a whole number of GPUs")


def require_resources(name: str, resources: Mapping[str, float]) -> None:
    """Refuse custom resources that no node can have.

    Raises:
        ConfigError: Ray's own names, or numbers that are not above 0.
    """
    for key, count in resources.items():
        if key in OWN or not 0 < count < math.inf:
            hint = f"{key} has settings of its own" if key in OWN else "expected a number above 0"
            raise ConfigError(f"{name} = {{{key}: {count:g}}}: {hint}")


@dataclass
class Node:
    """A machine: its ``total`` resources by Ray's names, and those that are ``free``; the bytes of each of its GPUs, 0
    where that is not known; and its id, as Ray has it.
    """

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    gpu_memory: int = 0
    id: str = ""


class _Machine:
    """What is left of a node while processes are placed on it, in parts of ``EXACT``; its GPUs one by one, and bytes of
    each.
    """

    def __init__(self, node: Node) -> None:
        self.left = {name: round(n * EXACT) for name, n in node.free.items() if name != GPU}
        whole, rest = divmod(round(node.free.get(GPU, 0) * EXACT), EXACT)
        self.gpus = [EXACT] * whole + ([rest] if rest else [])
        self.bytes: list[float] = [node.gpu_memory or math.inf] * len(self.gpus)
        self.taken: list[frozenset[str]] = [frozenset() for _ in self.gpus]

    def options(self, need: Mapping[str, int], alone: str) -> list[dict[int, int]]:
        """The ways to take in what needs so much: what to take of which GPU, the fullest first; none where it does not
        fit. No GPU has two of a role that is ``alone``.
        """
        if any(self._of_node(name) < n for name, n in need.items() if name not in (GPU, GPU_MEMORY)):
            return []
        gpus = need.get(GPU, 0)
        if not gpus:
            return [{}]
        each = need.get(GPU_MEMORY, 0) / max(1, gpus // EXACT)
        fits = [at for at, n in enumerate(self.gpus) if n >= min(gpus, EXACT) and self.bytes[at] * EXACT >= each]
        if gpus >= EXACT:
            free = fits[: gpus // EXACT]
            return [dict.fromkeys(free, EXACT)] if len(free) * EXACT == gpus else []
        kinds = {self._kind(at): at for at in reversed(fits) if not (alone and alone in self.taken[at])}
        return [{at: gpus} for _, at in sorted(kinds.items(), key=lambda item: item[0][0])]

    def _of_node(self, name: str) -> float:
        return self.left.get(name, math.inf if name == MEMORY else 0)

    def _kind(self, gpu: int) -> tuple[int, float, tuple[str, ...]]:
        """Equal for GPUs on which the same fits."""
        return self.gpus[gpu], self.bytes[gpu], tuple(sorted(self.taken[gpu]))

    def take(self, need: Mapping[str, int], option: Mapping[int, int], alone: str, sign: int = 1) -> None:
        """Take it in; with ``sign`` -1 give it back."""
        for name, n in need.items():
            if name in self.left:
                self.left[name] -= sign * n
        for at, n in option.items():
            self.gpus[at] -= sign * n
            self.bytes[at] -= sign * need.get(GPU_MEMORY, 0) / len(option) / EXACT
            if alone:
                self.taken[at] = self.taken[at] | {alone} if sign > 0 else self.taken[at] - {alone}

    @property
    def room(self) -> int:
        """What is left, GPUs before cores."""
        return sum(self.gpus) * EXACT + self.left.get(CPU, 0)

    @property
    def state(self) -> tuple:
        """Equal for nodes on which the same fits."""
        return tuple(sorted(self.left.items())), tuple(sorted(map(self._kind, range(len(self.gpus)))))


class _Search:
    """Places processes one after another, each where the least is left over, and goes back where that leads nowhere."""

    def __init__(self, nodes: Sequence[Node], roles: Sequence[Role]) -> None:
        self.machines = [_Machine(node) for node in nodes]
        self.processes = sorted((role for role in roles for _ in range(role.count)), key=_hardness, reverse=True)
        self.tries = TRIES

    def run(self, first: int = 0) -> bool:
        """Whether all from ``first`` on fit; false, too, where too much was tried."""
        if first == len(self.processes):
            return True
        need, alone = _need(self.processes[first])
        for machine, option in self._options(need, alone):
            self.tries -= 1
            if self.tries < 0:
                return False
            machine.take(need, option, alone)
            if self.run(first + 1):
                return True
            machine.take(need, option, alone, -1)
        return False

    def greedy(self) -> Counter[str]:
        """How many of each role find no place where none is moved again."""
        missing: Counter[str] = Counter()
        for role in self.processes:
            need, alone = _need(role)
            found = self._options(need, alone)
            if found:
                found[0][0].take(need, found[0][1], alone)
            else:
                missing[role.name] += 1
        return missing

    def _options(self, need: Mapping[str, int], alone: str) -> list[tuple[_Machine, dict[int, int]]]:
        """Nodes and their GPUs, one of each that are alike, the fullest first."""
        alike: dict[tuple, _Machine] = {}
        for machine in self.machines:
            alike.setdefault(machine.state, machine)
        tried = sorted(alike.values(), key=lambda machine: machine.room)
        return [(machine, one) for machine in tried for one in machine.options(need, alone)]


def _need(role: Role) -> tuple[dict[str, int], str]:
    """What one reserves, in parts of ``EXACT``; and the role's name where no two may share a GPU."""
    each = {**role.each, **role.bytes}
    return {name: round(n * EXACT) for name, n in each.items()}, role.name if role.alone else ""


def _hardness(role: Role) -> tuple[float, ...]:
    """The order in which processes are placed: what is hardest to place is the largest."""
    return role.gpus, sum(role.resources.values()), role.cpus, role.memory


@dataclass(frozen=True)
class Placement:
    """The roles of a run, and how many processes of each have no place; the nodes that were looked at."""

    roles: tuple[Role, ...]
    missing: Mapping[str, int]
    nodes: tuple[Node, ...] = ()

    def there(self, role: Role) -> int:
        """How many processes of a role have a place."""
        return role.count - self.missing.get(role.name, 0)


def place(nodes: Sequence[Node], roles: Sequence[Role]) -> Placement:
    """Place all processes of ``roles`` on what is free of ``nodes``."""
    missing = _Search(nodes, roles).greedy()
    if missing and sum(role.count for role in roles) <= SEARCHED and _Search(nodes, roles).run():
        missing = Counter()
    return Placement(tuple(roles), missing, tuple(nodes))


def require_place(nodes: Sequence[Node], roles: Sequence[Role]) -> Placement:
    """The placement of all roles.

    Raises:
        DoesNotFit: what is missing, in a line.
    """
    found = place(nodes, roles)
    if found.missing:
        empty = [replace(node, free=node.total) for node in nodes]
        raise DoesNotFit(_told(nodes, found, busy=not place(empty, roles).missing))
    return found


def _told(nodes: Sequence[Node], found: Placement, busy: bool) -> str:
    """What does not fit, and what there is."""
    lost = [role for role in found.roles if role.name in found.missing]
    short = [f"{found.missing[role.name]} of {role.count} {role.name} ({_shown(role)} each)" for role in lost]
    names = {name for role in lost for name in (*role.each, *role.bytes)}
    need = {name: sum(role.count * _of(role, name) for role in found.roles) for name in names}
    have = {name: _free(nodes, name) for name in names}
    sums = ", ".join(
        f"{_amount(name, need[name])} wanted, {_amount(name, have[name], named=False)} free"
        for name in sorted(names)
        if have[name] < math.inf
    )
    why = "others hold the rest, wait or end them" if busy else "add nodes, or ask for less"
    split = ", on no single node or GPU together" if all(need[name] <= have[name] for name in names) else ""
    return (
        f"the cluster has no place for {' and '.join(short)}: {sums} on {len(nodes)} node{'s' * (len(nodes) != 1)}"
        f"{split}; {why}"
    )


def _of(role: Role, name: str) -> float:
    """What each of a role wants of a resource, as Ray counts it."""
    return round({**role.each, **role.bytes}.get(name, 0) * EXACT) / EXACT


def _free(nodes: Sequence[Node], name: str) -> float:
    """What is free of a resource on all nodes; of memory that is not known any amount."""
    if name == GPU_MEMORY:
        return sum(n.free.get(GPU, 0) * (n.gpu_memory or math.inf) for n in nodes if n.free.get(GPU, 0))
    return sum(node.free.get(name, math.inf if name == MEMORY else 0) for node in nodes)


def _amount(name: str, n: float, named: bool = True) -> str:
    """A number of a resource: of bytes in GB."""
    text = f"{n / 1e9:.3g} GB" if name in (MEMORY, GPU_MEMORY) else f"{n:g}"
    return f"{text} {'of ' if name in (MEMORY, GPU_MEMORY) else ''}{name}" if named else text


def _shown(role: Role) -> str:
    return ", ".join(_amount(name, n) for name, n in {**role.each, **role.bytes}.items()) or "no resources"


def private(roles: Sequence[Role]) -> tuple[int, int]:
    """The cores and GPUs with which a private cluster has all roles."""
    cpus, gpus = (sum(round(r.each.get(name, 0) * EXACT) * r.count for r in roles) / EXACT for name in (CPU, GPU))
    return max(1, math.ceil(cpus)), math.ceil(gpus)
