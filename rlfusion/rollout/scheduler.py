"""Which worker runs which item, and what follows when one dies, hangs or answers twice: a state machine without I/O.

Events come in as method calls with the time; commands go out as records. The caller owns clock, processes and messages,
so the same machine drives Ray and a simulation. Items and workers are numbers that are never used again.

    an item     waits -> is leased to one worker until a deadline -> is done
    a worker    starts (until a deadline) -> idles <-> works -> is lost (died, or killed past a deadline)

How long a lease is follows from how long items really take. With tau the p99 of the seconds a sample of the last
``WINDOW`` items, for an item of n samples whose lease ran out a times before, a at most ``DOUBLINGS``:

    (1)  lease = item_s 2^a                                   before any item was done
    (2)  lease = max(item_floor_s, item_times n tau) 2^a      after

so that a worker that hangs is found in the time of a few items, and one that is merely slow is given longer.
tau is that of the moment: what is learned while an item runs moves its deadline too.

A lost worker's item goes to the front of the queue, at most ``attempts`` times; a lost worker is replaced, at most
``replacements`` times the number of workers without an item being done in between. An item or a start that raises is
the program's own error: it ends the run at once. So every run ends, and says what it waited for.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rlfusion.common.errors import ConfigError, UnavailableError, require_positive

WINDOW = 200
"""Items whose durations are remembered."""
QUANTILE = 0.99
DOUBLINGS = 2


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds, and counts.

    Attributes:
        item_s: within which a worker finishes one item while no item has been done, else it is taken to hang and
            killed. Once items have been done, the time is a multiple of what they took.
        item_times: that multiple, of the 99th percentile of the seconds a sample of the last 200 items.
        item_floor_s: its least value, at most ``item_s``; more than a reward may have to wait for a server of its own.
        start_s: within which a new worker is placed and has built its task.
        attempts: how often one item may be given out; after one that took too long, for twice
            that time, after two for four times.
        replacements: lost workers, as a multiple of the workers, before an item is done again.

    Raises:
        ConfigError: a number that is not above 0, ``item_times`` below 1, or a floor above ``item_s``.
    """

    item_s: float = 1800.0
    item_times: float = 10.0
    item_floor_s: float = 150.0
    start_s: float = 300.0
    attempts: int = 3
    replacements: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "item_s", "item_times", "item_floor_s", "start_s", "attempts", "replacements")
        if not self.item_times >= 1:
            raise ConfigError(f"item_times = {self.item_times:g}: expected a number >= 1, as items vary")
        if self.item_floor_s > self.item_s:
            raise ConfigError(
                f"item_floor_s = {self.item_floor_s:g}: expected at most item_s = {self.item_s:g}, the time of the "
                "first items"
            )


@dataclass(frozen=True)
class Start:
    """Start the new worker ``worker``."""

    worker: int


@dataclass(frozen=True)
class Assign:
    """Give ``item`` to the idle worker ``worker``."""

    worker: int
    item: int


@dataclass(frozen=True)
class Kill:
    """Kill ``worker``; nothing that it still says matters."""

    worker: int


Command = Start | Assign | Kill


class RolloutError(UnavailableError):
    """Workers cannot be had, or were lost more often than the limits allow."""


class _Durations:
    """The seconds a sample that the last items took, from being given out to being answered."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self.p99 = math.nan

    def add(self, seconds: float, samples: int) -> bool:
        """Whether the p99 is another one now."""
        before = self.p99
        self._last.append(seconds / samples)
        self.p99 = sorted(self._last)[math.ceil(QUANTILE * len(self._last)) - 1]
        return self.p99 != before


@dataclass
class _Worker:
    """Starting, idle, or working ``since`` then on an item."""

    since: float
    deadline: float
    item: int | None = None
    starting: bool = True


class Scheduler:
    """Brings items to ``size`` workers. Every method that takes the time returns commands, in order.

    ``open`` holds the items that are not done, number to name.
    """

    def __init__(self, size: int, limits: Limits) -> None:
        self.size, self.limits = size, limits
        self.open: dict[int, str] = {}
        self.queue: deque[int] = deque()
        self.workers: dict[int, _Worker] = {}
        self._attempts: dict[int, int] = {}
        self._late: dict[int, int] = {}
        self._samples: dict[int, int] = {}
        self._durations = _Durations()
        self._lost = self._items = self._started = 0

    @property
    def idle(self) -> list[int]:
        """The workers that have started and have no item."""
        return [number for number, worker in self.workers.items() if not worker.starting and worker.item is None]

    def add(self, names: Sequence[str], samples: Sequence[int], now: float) -> tuple[range, list[Command]]:
        """Take in items by name, each of so many ``samples``: their numbers, and what to do first."""
        numbers = range(self._items, self._items + len(names))
        self._items += len(names)
        self._lost = 0
        self.open |= dict(zip(numbers, names, strict=True))
        self._samples |= dict(zip(numbers, samples, strict=True))
        self.queue.extend(numbers)
        return numbers, self._advance(now)

    def ready(self, worker: int, now: float) -> list[Command]:
        """``worker`` has started."""
        if worker in self.workers and self.workers[worker].starting:
            self.workers[worker].starting = False
            self._free(self.workers[worker])
        return self._advance(now)

    def result(self, worker: int, item: int, now: float) -> tuple[bool, list[Command]]:
        """``worker`` answered ``item``: whether the answer is the first and counts, and what to do next."""
        first = self.open.pop(item, None) is not None
        if first:
            self._lost = 0
            self._attempts.pop(item, None)
            self._late.pop(item, None)
        samples = self._samples.pop(item, 0)
        if worker in self.workers and self.workers[worker].item == item:
            self._free(self.workers[worker])
            if first and self._durations.add(now - self.workers[worker].since, samples):
                self._move_deadlines()
        elif first:  # late, from a worker taken for dead: the item may wait for another
            self.queue = deque(waiting for waiting in self.queue if waiting != item)
        return first, self._advance(now)

    def lost(self, worker: int, reason: str, now: float) -> list[Command]:
        """``worker`` has died, or is to be taken for dead.

        Raises:
            RolloutError: the limits are reached; it says of what, and why the last worker was lost.
        """
        if worker not in self.workers:
            return []
        item = self.workers.pop(worker).item
        self._lost += 1
        if self._lost > self.limits.replacements * self.size:
            waiting = "; ".join([*self.open.values()][:3])
            raise RolloutError(
                f"{self._lost} workers were lost and no item was done in between, while waiting for {len(self.open)} "
                f"items ({waiting}); the last: worker {worker} {reason}"
            )
        if item in self.open:
            if self._attempts[item] >= self.limits.attempts:
                raise RolloutError(f"{self.open[item]} lost its worker {self._attempts[item]} times; the last {reason}")
            self.queue.appendleft(item)
        return self._advance(now)

    def tick(self, now: float) -> list[Command]:
        """Kill the workers that are past their deadline.

        Raises:
            RolloutError: as ``lost``.
        """
        commands: list[Command] = []
        for number in [n for n, worker in self.workers.items() if now >= worker.deadline]:
            reason = self._overdue(self.workers[number])
            commands += [Kill(number), *self.lost(number, reason, now)]
        return commands

    def _overdue(self, worker: _Worker) -> str:
        """The message about a worker that is past its deadline."""
        if worker.starting:
            return f"was not ready within ray.limits.start_s = {self.limits.start_s:g} s"
        item, seconds = worker.item, worker.deadline - worker.since
        assert item is not None  # neither starting nor idle: an idle one has no deadline
        name = self.open.get(item, "a duplicate")
        self._late[item] = self._late.get(item, 0) + 1
        return f"did not finish {name} within {seconds:.3g} s (ray.limits.item_s, item_times and item_floor_s set that)"

    def deadline(self) -> float:
        """The time at which ``tick`` is needed, if nothing happens before."""
        return min((worker.deadline for worker in self.workers.values()), default=math.inf)

    def _lease(self, item: int) -> float:
        """Eq. (1) and (2)."""
        limits, longer = self.limits, 2 ** min(self._late.get(item, 0), DOUBLINGS)
        if math.isnan(self._durations.p99):
            return limits.item_s * longer
        return max(limits.item_floor_s, limits.item_times * self._samples.get(item, 0) * self._durations.p99) * longer

    def _move_deadlines(self) -> None:
        for worker in self.workers.values():
            if worker.item is not None:
                worker.deadline = worker.since + self._lease(worker.item)

    @staticmethod
    def _free(worker: _Worker) -> None:
        worker.item, worker.deadline = None, math.inf

    def _advance(self, now: float) -> list[Command]:
        """Give waiting items to idle workers, and start workers while items need them."""
        commands: list[Command] = [self._assign(n, self.queue.popleft(), now) for n in self.idle[: len(self.queue)]]
        while len(self.workers) < min(self.size, len(self.open)):
            self.workers[self._started] = _Worker(now, now + self.limits.start_s)
            commands.append(Start(self._started))
            self._started += 1
        return commands

    def _assign(self, number: int, item: int, now: float) -> Assign:
        self.workers[number] = _Worker(now, now + self._lease(item), item, starting=False)
        self._attempts[item] = self._attempts.get(item, 0) + 1
        return Assign(number, item)
