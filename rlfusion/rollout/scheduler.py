"""Which worker runs which item, and what follows when one dies, hangs or answers twice: a state machine without I/O.

Events come in as method calls with the time; commands go out as records. The caller owns clock, processes and messages,
so the same machine drives Ray and a simulation. Items and workers are numbers that are never used again.

    an item     waits -> is leased to one worker until a deadline -> is done
    a worker    starts (until a deadline) -> idles <-> works -> is lost (died, or killed past a deadline)

A lost worker's item goes to the front of the queue, at most ``attempts`` times; a lost worker is replaced, at most
``replacements`` times the number of workers without an item being done in between. An item or a start that raises is
the program's own error: it ends the run at once. So every run ends, and says what it waited for.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rlfusion.errors import require_positive


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds, and counts.

    Attributes:
        item_s: within which a worker finishes one item, else it is taken to hang and killed.
        start_s: within which a new worker is placed and has built its task.
        attempts: how often one item may be given out.
        replacements: lost workers, as a multiple of the workers, before an item is done again.
    """

    item_s: float = 600.0
    start_s: float = 180.0
    attempts: int = 3
    replacements: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "item_s", "start_s", "attempts", "replacements")


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


class RolloutError(RuntimeError):
    """Workers were lost more often than the limits allow."""


@dataclass
class _Worker:
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
        self._lost = self._items = self._started = 0

    @property
    def idle(self) -> list[int]:
        """The workers that have started and have no item."""
        return [number for number, worker in self.workers.items() if not worker.starting and worker.item is None]

    def add(self, names: Sequence[str], now: float) -> tuple[range, list[Command]]:
        """Take in items by name: their numbers, and what to do first."""
        numbers = range(self._items, self._items + len(names))
        self._items += len(names)
        self._lost = 0
        self.open |= dict(zip(numbers, names))
        self.queue.extend(numbers)
        return numbers, self._advance(now)

    def ready(self, worker: int, now: float) -> list[Command]:
        """``worker`` has started."""
        if worker in self.workers and self.workers[worker].starting:
            self.workers[worker].starting = False
        return self._advance(now)

    def result(self, worker: int, item: int, now: float) -> tuple[bool, list[Command]]:
        """``worker`` answered ``item``: whether the answer is the first and counts, and what to do next."""
        first = self.open.pop(item, None) is not None
        if first:
            self._lost = 0
            self._attempts.pop(item, None)
        if worker in self.workers and self.workers[worker].item == item:
            self.workers[worker].item = None
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
        for number in [n for n, worker in self.workers.items() if now >= self._deadline(worker)]:
            worker = self.workers[number]
            what = f"was not ready within {self.limits.start_s:g} s"
            if not worker.starting:
                what = f"did not finish {self.open.get(worker.item, 'a duplicate')} within {self.limits.item_s:g} s"
            commands += [Kill(number), *self.lost(number, what, now)]
        return commands

    def deadline(self) -> float:
        """The time at which ``tick`` is needed, if nothing happens before."""
        return min(map(self._deadline, self.workers.values()), default=float("inf"))

    @staticmethod
    def _deadline(worker: _Worker) -> float:
        return worker.deadline if worker.starting or worker.item is not None else float("inf")

    def _advance(self, now: float) -> list[Command]:
        """Give waiting items to idle workers, and start workers while items need them."""
        commands: list[Command] = [self._assign(n, self.queue.popleft(), now) for n in self.idle[: len(self.queue)]]
        while len(self.workers) < min(self.size, len(self.open)):
            self.workers[self._started] = _Worker(now + self.limits.start_s)
            commands.append(Start(self._started))
            self._started += 1
        return commands

    def _assign(self, number: int, item: int, now: float) -> Assign:
        worker = self.workers[number]
        worker.item, worker.deadline = item, now + self.limits.item_s
        self._attempts[item] = self._attempts.get(item, 0) + 1
        return Assign(number, item)
