"""A group of ranks as Ray actors: started, followed, and begun again where one of them is lost.

Ray starts and places the processes; among themselves they talk through torch.distributed (gloo; NCCL between GPUs). The
group lives and dies as one: when a rank dies, hangs or loses the others, all are killed and a new group does the same
work, which goes on from what its run has saved.
"""

import importlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlfusion.common.code_files import receive, texts_of
from rlfusion.common.errors import RlfusionError, StorageError, require_not_negative, require_positive
from rlfusion.common.user_code import blamed
from rlfusion.rollout.ray_cluster import LOOPBACK, first_line
from rlfusion.rollout.ray_placement import of_rank
from rlfusion.rollout.ray_stacks import BESIDE, GRACE_S, here, stacks_of
from rlfusion.rollout.together import Placing
from rlfusion.training.ranks import Ranks, joined
from rlfusion.training.stacks import write_stacks

POLL_S = 0.2
Event = tuple[str, Any]
"""What a rank says while it works: a kind, and plain data."""


class GroupLost(RlfusionError):
    """The ranks were lost, and lost again when they were begun anew."""

    exit_code, kind = 69, "unavailable"


@dataclass(frozen=True)
class GroupSettings:
    """Where ranks run.

    Attributes:
        ranks: the processes of the group, N.
        shares: V of ``training.ranks``.
        exact: Eq. (2) of ``training.ranks``.
        cpus: CPU cores that each reserves.
        gpus: GPUs that each reserves.
        threads: torch threads of each.
        restarts: times that a lost group is begun anew.
        timeout_s: for which a rank may neither answer nor, among the others, join in what they do together.
        loopback: whether all are on this machine, and listen on its loopback alone.
        resources: Ray's custom resources that each reserves.
        start_s: within which all are placed, on nodes that may have to install their libraries first, and answer.
        placing: of the workers beside them or apart from them (``together``).
    """

    ranks: int
    shares: int
    exact: bool
    cpus: float
    gpus: float
    threads: int
    restarts: int
    timeout_s: float
    loopback: bool
    resources: Mapping[str, float] = field(default_factory=dict)
    start_s: float = 300.0
    placing: Placing = "any"

    def __post_init__(self) -> None:
        require_positive(self, "ranks", "shares", "threads", "timeout_s", "start_s")
        require_not_negative(self, "restarts", "cpus", "gpus")


class Rank:
    """The actor of one rank. ``join`` and ``work`` run in its main thread of work, the others beside it."""

    def __init__(self, settings: dict[str, Any], rank: int, paths: list[str], texts: Mapping[str, str]) -> None:
        sys.path.extend(path for path in paths if path not in sys.path)
        receive(texts)
        self.settings, self.rank = GroupSettings(**settings), rank
        self.events: list[Event] = []
        self.stop = 0
        torch.set_num_threads(self.settings.threads)

    def address(self) -> tuple[str, int]:
        """Listen for the others: the host and port of the group's store, on the loopback where all are here."""
        host = LOOPBACK if self.settings.loopback else ray.util.get_node_ip_address()
        self.listener = socket.create_server((host, 0))
        return self.listener.getsockname()[:2]

    def join(self, host: str, port: int, first: Any) -> None:
        """Meet the others, of whom ``first`` is the actor of the first rank."""
        self.shelf = _RayShelf(self, first)
        if self.settings.loopback:
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        patience = timedelta(seconds=self.settings.timeout_s)
        listening: Any = {"master_listen_fd": self.listener.detach()} if self.rank == 0 else {}
        # torch 2.6 takes a socket that listens already in this backend alone
        store = torch.distributed.TCPStore(
            host, port, self.settings.ranks, self.rank == 0, patience, use_libuv=False, **listening
        )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.settings.ranks, timeout=patience
        )

    def work(self, entry: str, payload: dict[str, Any]) -> Any:
        """What ``entry``, package.module:name, gives for ``payload`` and this actor."""
        module, _, name = entry.partition(":")
        ranks = Ranks(self.rank, self.settings.ranks, self.settings.shares, self.settings.exact)
        ranks.shelf = self.shelf
        with joined(ranks):
            return getattr(importlib.import_module(module), name)(payload, self)

    def say(self, kind: str, held: Any) -> None:
        """Let the driver know of something."""
        self.events.append((kind, held))

    def news(self, seen: int) -> list[Event]:
        """The events after the first ``seen``; that it answers says that it lives."""
        return self.events[seen:]

    def places(self, number: int) -> list[tuple[str, Any]]:
        """What the first rank's shelf has, for another rank."""
        return self.shelf.held[number]

    def request_stop(self, number: int) -> None:
        """A signal came to the driver."""
        self.stop = number

    def pid(self) -> int:
        """The process."""
        return os.getpid()

    def stacks(self) -> str:
        """Where each thread of the process stands."""
        return here()


class _RayShelf:
    """References to what lies in Ray's object store; the first rank keeps those of the last rollout."""

    def __init__(self, rank: Rank, first: Any) -> None:
        self.rank, self.first = rank.rank, first
        self.held: dict[int, list[tuple[str, Any]]] = {}

    def put(self, number: int, places: list[tuple[str, Any]]) -> None:
        self.held[number] = places

    def get(self, number: int) -> list[tuple[str, Any]]:
        if not self.rank:
            self.held = {number: self.held[number]}  # all ranks have said that they are here
            return self.held[number]
        return ray.get(self.first.places.options(concurrency_group=BESIDE).remote(number))

    def fetch(self, place: Any) -> np.ndarray:
        return ray.get(place)


class _Lost(Exception):
    """A rank died, hung or lost the others."""


class Group:
    """The ranks of one attempt."""

    def __init__(self, settings: GroupSettings, texts: Mapping[str, str]) -> None:
        self.settings, self.seen = settings, 0
        paths = [os.path.abspath(path) for path in sys.path]
        placed: Any = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "resources": dict(settings.resources)}
        placed["concurrency_groups"] = {BESIDE: 4}
        actor: Any = ray.remote(max_restarts=0, max_task_retries=0, **placed)(Rank)
        made = (asdict(settings), paths, texts)
        self.actors: list[Any] = [
            actor.options(**of_rank(settings.placing, rank)).remote(made[0], rank, *made[1:])
            for rank in range(settings.ranks)
        ]
        self.answered: list[float] = []
        self.asked: dict[Any, int] = {}

    def beside(self, rank: int, method: str, *arguments: Any) -> Any:
        """Call a method that runs beside the work."""
        return getattr(self.actors[rank], method).options(concurrency_group=BESIDE).remote(*arguments)

    def meet(self) -> None:
        """Let the ranks find each other."""
        start_s, timeout_s = self.settings.start_s, self.settings.timeout_s
        host, port = self._wait([self.beside(0, "address")], start_s)[0]
        self._wait([actor.join.remote(host, port, self.actors[0]) for actor in self.actors], start_s + timeout_s)

    def _wait(self, calls: list[Any], seconds: float) -> list[Any]:
        try:
            return ray.get(calls, timeout=seconds)
        except GetTimeoutError as error:
            raise _Lost(f"the ranks did not start within {seconds:.0f} s") from error
        except RayTaskError as error:
            raise _meant(error) from error
        except RayError as error:
            raise _Lost(first_line(error)) from error

    def run(self, entry: str, payload: dict[str, Any], hear: Callable[[Event], None], stop: Callable[[], int]) -> Any:
        """What the first rank's work gives; ``hear`` is told its events, ``stop`` says which signal came, or 0."""
        calls = {actor.work.remote(entry, payload): rank for rank, actor in enumerate(self.actors)}
        begun = time.monotonic() + self.settings.start_s  # what it imports first may take long
        self.answered = [begun] * self.settings.ranks
        told = False
        while True:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=POLL_S)
            for call in ready:
                rank = calls.pop(call)
                result = self._result(call, rank, calls)
                if rank == 0:
                    self._hear(hear)
                    return result
            if stop() and not told:
                told = True
                for rank in range(len(self.actors)):
                    self.beside(rank, "request_stop", stop())
            self._listen(hear)

    def _result(self, call: Any, rank: int, others: Mapping[Any, int]) -> Any:
        try:
            return ray.get(call)
        except RayTaskError as error:
            raise _meant(error, rank) from error
        except RayActorError as error:
            raise _Lost(f"rank {rank} died: {first_line(error)}") from error
        except RayError as error:
            raise _Lost(f"rank {rank} is lost: {first_line(error)}") from error

    def _listen(self, hear: Callable[[Event], None]) -> None:
        """Ask each rank for its news, and see that it answers."""
        for rank in set(range(len(self.actors))) - set(self.asked.values()):
            self.asked[self.beside(rank, "news", self.seen if rank == 0 else sys.maxsize)] = rank
        ready, _ = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)
        for call in ready:
            rank = self.asked.pop(call)
            with suppress(RayError):  # its work says so, too
                events = ray.get(call)
                self.answered[rank] = time.monotonic()
                for event in events:
                    self.seen += 1
                    hear(event)
        for rank, at in enumerate(self.answered):
            if time.monotonic() - at > self.settings.timeout_s:
                raise _Lost(f"rank {rank} does not answer for {self.settings.timeout_s:g} s")

    def _hear(self, hear: Callable[[Event], None]) -> None:
        """The last news of the first rank."""
        with suppress(RayError, GetTimeoutError):
            for event in ray.get(self.beside(0, "news", self.seen), timeout=GRACE_S):
                hear(event)

    def stacks(self) -> dict[int, str]:
        """Where each rank stands; of one that does not answer, that."""
        return stacks_of(dict(enumerate(self.actors)))

    def kill(self) -> None:
        """End all of it."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


@contextmanager
def _group(settings: GroupSettings, texts: Mapping[str, str]) -> Iterator[Group]:
    group = Group(settings, texts)
    try:
        group.meet()
        yield group
    finally:
        group.kill()


def run_in_group(
    settings: GroupSettings,
    entry: str,
    payload: dict[str, Any],
    hear: Callable[[Event], None],
    stop: Callable[[], int],
) -> Any:
    """What ``entry``, package.module:name, gives in the first of the ranks; all of them call it with ``payload``, which
    is plain data, and the actor (``Rank``). A group that is lost is begun anew.

    Raises:
        GroupLost: it was lost more often than ``settings.restarts``.
        RlfusionError: a rank's own.
    """
    for attempt in range(settings.restarts + 1):
        try:
            with _group(settings, texts_of(payload)) as group:
                return _stood(group, payload, lambda: group.run(entry, payload, hear, stop))
        except _Lost as lost:
            left = settings.restarts - attempt
            hear(("end", None))
            hear(("say", f"the group of {settings.ranks} ranks is lost ({lost}); restarts left: {left}"))
            why = lost
    raise GroupLost(
        f"the group of {settings.ranks} ranks was lost {settings.restarts + 1} times, at last because {why}"
    ) from why


def _stood(group: Group, payload: Mapping[str, Any], work: Callable[[], Any]) -> Any:
    """What ``work`` gives. Where the group is lost, where each rank stood is kept in the run's folder, which is named.

    Raises:
        _Lost: the group is lost.
    """
    try:
        return work()
    except _Lost as lost:
        if "folder" not in payload:
            raise
        try:
            file = write_stacks(Path(payload["folder"]), "ranks", group.stacks())
        except StorageError:  # a disk that is full need not end what can be begun anew
            raise lost from None
        raise _Lost(f"{lost}; where each rank stood: {file}") from lost


def _meant(error: RayTaskError, rank: int = 0) -> Exception:
    """The error of a rank as this process would have raised it; ``_Lost`` where it only lost the others."""
    cause = error.cause if isinstance(error.cause, Exception) else RuntimeError(first_line(error))
    if isinstance(cause, RlfusionError) or blamed(cause) is not None:
        cause.add_note(f"on rank {rank}")
        return cause
    text = str(cause)
    if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):  # walks on a node that is gone
        return _Lost(f"rank {rank} lost what others had for it: {first_line(cause)[:200]}")
    if isinstance(cause, torch.distributed.DistError) or "gloo" in text or "NCCL" in text:
        return _Lost(f"rank {rank} lost the others: {text.splitlines()[0][:200]}")
    return cause
