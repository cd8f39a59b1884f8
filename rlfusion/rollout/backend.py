"""The one interface of all rollout backends: items and weights in, trajectories out, in the order of the items."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.weights import Weights, WeightsError
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.limits import Limits
from rlfusion.rollout.placement import Role
from rlfusion.rollout.ray_address import require_address
from rlfusion.rollout.together import Placing
from rlfusion.rollout.trajectory import Trajectory

NO_REWARDS = Role("reward workers", 0, 0.0)


@dataclass(frozen=True)
class Settings:
    """The place where rollouts run.

    Attributes:
        workers: Ray workers; 0 runs in this process, without Ray.
        cpus_per_worker: CPU cores that each reserves.
        gpus_per_worker: GPUs that each reserves; a fraction shares one.
        threads: torch threads of a worker; equal results need equal numbers on both sides.
        address: of a running Ray cluster; "" starts a private one that listens on this machine's loopback alone.
        limits: deadlines and retries.
        connect_timeout_s: within which the cluster at ``address`` and a worker of it must answer, before anything else.
        start_timeout_s: for which each of a private cluster's processes is waited for; it is tried twice.
        resources: Ray's custom resources that each worker reserves.
        rewards: the actors of rewards that run beside the workers.
        wait_s: for which a cluster may take to have a place for all.
        placing: of workers beside ranks or apart from them (``together``).
        overlap: without workers, the reward of an item is computed while the next one is walked.
    """

    workers: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    threads: int = 1
    address: str = ""
    limits: Limits = field(default_factory=Limits)
    connect_timeout_s: float = 60.0
    start_timeout_s: float = 120.0
    resources: Mapping[str, float] = field(default_factory=dict)
    rewards: Role = NO_REWARDS
    wait_s: float = 0.0
    placing: Placing = "any"
    overlap: bool = False

    def __post_init__(self) -> None:
        require_address(self.address)
        require_positive(self, "connect_timeout_s", "start_timeout_s")
        for name, least in (("workers", 0), ("cpus_per_worker", 0), ("gpus_per_worker", 0), ("threads", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected at least {least}")

    @property
    def roles(self) -> tuple[Role, Role]:
        """The processes that are wanted of a cluster."""
        held = (self.cpus_per_worker, self.gpus_per_worker, self.resources)
        return Role("rollout workers", self.workers, *held, threads=self.threads), self.rewards

    def worker_device(self, device: str) -> str:
        """Where a worker works: on the GPU that it reserves, which is then the only one that Ray shows it; else on the
        CPU, where the learner's ``device`` is a GPU of CUDA. Without workers it is that of the learner.
        """
        if not self.workers:
            return device
        kind = device.partition(":")[0]
        return "cuda" if self.gpus_per_worker else "cpu" if kind == "cuda" else kind


Pending = Callable[[], list[Trajectory]]
"""Waits for submitted items and returns their trajectories in order (of ranks: one that joins them), or raises what
stopped them.
"""


class Backend(ABC):
    """Runs work items. Use it as a context manager, or call ``close``."""

    @abstractmethod
    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        """Begin ``items`` under ``weights``; a worker pool goes on while the caller does other work.

        Raises:
            WeightsError: an item asks for another version than ``weights`` has.
        """

    def require_room(self, weights: int, versions: int, answer: int) -> None:
        """Refuse rollouts that this backend cannot hold: so many bytes of the weights, in ``versions`` at once, and of
        the answer to an item.

        Raises:
            ConfigError: they do not fit.
        """
        return

    def moved(self) -> dict[str, int]:
        """The bytes that moved between processes since this was last asked: ``weights_to_workers``, counted where a
        worker has said that it acts under them; ``answers_from_workers``, to this process; ``walks_to_rank``, of its
        shares. Nothing in one process.
        """
        return {}

    @abstractmethod
    def close(self) -> None:
        """Stop what runs and give everything back; a second call does nothing."""

    def collect(self, items: Sequence[WorkItem], weights: Weights) -> list[Trajectory]:
        """The trajectory of each item, in the order of the items."""
        return self.submit(items, weights)()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Away(NamedTuple):
    """An answer whose walks lie where they were drawn: all else of it (``head.x`` has no row), the SHA-256 of their
    bytes, and where they are.
    """

    head: Trajectory
    sha256: str
    where: Any


class Pool(Backend):
    """A backend whose walks are drawn elsewhere, and may stay there."""

    @abstractmethod
    def submit_apart(self, items: Sequence[WorkItem], weights: Weights) -> Callable[[], list[Away]]:
        """As ``submit``; only what is small comes here."""


def check_versions(items: Sequence[WorkItem], weights: Weights) -> None:
    """Raise WeightsError unless every item asks for the version that ``weights`` has."""
    for item in items:
        if item.version != weights.version:
            raise WeightsError(f"{item}: got weights of version {weights.version}")
