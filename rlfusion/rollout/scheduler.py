"""Which worker runs which item, and what follows when one dies, hangs, fails or answers twice: a state machine without
I/O.

Events come in as method calls with the time; commands go out as records. The caller owns clock, processes and messages,
so the same machine drives Ray and a simulation. Items and workers are numbers that are never used again.

    an item     waits -> is leased to one worker until a deadline, or to two (a twin) -> is done
    a worker    starts (waits for a place, then builds) -> idles <-> works -> is lost (died, or killed past a deadline)

How long a lease is follows from how long items really take. With tau the p99 of the seconds a sample of the last
``WINDOW`` items, mu their median, for an item of n samples whose lease ran out a times before, a at most ``DOUBLINGS``:

    (1)  lease = item_s 2^a                                   before any item was done
    (2)  lease = max(item_floor_s, item_times n tau) 2^a      after
    (3)  twin  = twin_times n mu                              once ``FEWEST`` items were done

so that a worker that hangs is found in the time of a few items, and one that is merely slow is given longer.
tau and mu are those of the moment: what is learned while an item runs moves its deadline too.

An item that runs for longer than (3) is given to an idle worker too, where nothing waits. The first answer counts.
Both answers of one item are the same bits, if both workers are of one kind: else the run ends, for its result would
depend on who answers first.

Two budgets. ``crashes``: an item fails when it raises, or when its worker dies or runs out of its lease with it, on a
node that goes on. It then goes to the front of the queue, for a worker that has not tried it (an idle one makes room
for a new one where all have), until its failures are spent: it is poisonous. ``preemptions``: workers that are lost
with no item being done in between, whatever the cause. A start that raises ends the run at once, for it is the
program's own error. So every run ends, and says what it waited for.
"""

import itertools
import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from rlfusion.rollout.commands import Assign, Command, GiveUp, Kill, RolloutError, Start, TwinsDiffer
from rlfusion.rollout.durations import Durations
from rlfusion.rollout.limits import Limits

DOUBLINGS = 2


Lease = tuple[int, int]
"""What the time for an item follows from: its samples, and how often it was late."""
START: Lease = (0, 0)


@dataclass
class _Worker:
    """Starting or working on an item ``since`` then, for as long as its ``lease`` says; idle without one. One that
    found no room in time is ``homeless``; ``kind`` decides its bits.
    """

    since: float
    lease: Lease | None = START
    item: int | None = None
    placed: bool = False
    homeless: bool = False
    kind: str = ""


@dataclass
class _Item:
    """An item that is not done: who is at it, on whom it failed and how, how often it was late."""

    name: str
    samples: int
    holders: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    late: int = 0
    twinned: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass
class _Answer:
    """The first answer to an item that others are still at."""

    name: str
    worker: int
    kind: str
    digest: str
    holders: set[int]


class Scheduler:
    """Brings items to ``size`` workers. Every method that takes the time returns commands, in order.

    ``open`` holds the items that are not done by number; ``str`` of one is its name.
    """

    def __init__(self, size: int, limits: Limits) -> None:
        self.size, self.limits = size, limits
        self.open: dict[int, _Item] = {}
        self.queue: deque[int] = deque()
        self.workers: dict[int, _Worker] = {}
        self.twins = 0
        self._idle: dict[int, None] = {}
        self._leased: dict[Lease, dict[int, None]] = {}
        self._single: dict[int, dict[int, None]] = {}
        self._answered: dict[int, _Answer] = {}
        self._durations = Durations()
        self._lost = self._items = self._started = 0

    @property
    def idle(self) -> list[int]:
        """The workers that have started and have no item."""
        return list(self._idle)

    def add(self, names: Sequence[str], samples: Sequence[int], now: float) -> tuple[range, list[Command]]:
        """Take in items by name, each of so many ``samples``: their numbers, and what to do first."""
        numbers = range(self._items, self._items + len(names))
        self._items += len(names)
        self._lost = 0
        self.open |= {n: _Item(name, count) for n, name, count in zip(numbers, names, samples, strict=True)}
        self.queue.extend(numbers)
        return numbers, self._advance(now)

    def drop(self, items: Collection[int], now: float) -> list[Command]:
        """Forget items: nobody waits for them any more. Who is at one finishes it for nothing."""
        for number in items:
            self._close(number)
        self.queue = deque(waiting for waiting in self.queue if waiting in self.open)
        return self._advance(now)

    def placed(self, worker: int, now: float) -> list[Command]:
        """``worker`` has found its place, and builds its task."""
        if worker in self.workers and self.workers[worker].lease == START:
            self.workers[worker].placed, self.workers[worker].homeless = True, False
            self._lease(worker, START, now)
        return []

    def ready(self, worker: int, now: float, kind: str = "") -> list[Command]:
        """``worker`` has started. Workers of one ``kind`` give the same bits."""
        if worker in self.workers and self.workers[worker].lease == START:
            self.workers[worker].placed, self.workers[worker].kind = True, kind
            self._free(worker)
        return self._advance(now)

    def twinned(self, item: int) -> bool:
        """Whether an answer to ``item`` is compared with another: then ``result`` takes its digest."""
        return item in self._answered or (item in self.open and self.open[item].twinned)

    def result(self, worker: int, item: int, now: float, digest: str = "") -> tuple[bool, list[Command]]:
        """``worker`` answered ``item``: whether the answer is the first and counts, and what to do next.

        Raises:
            TwinsDiffer: the first answer, of a worker of the same kind, had another ``digest``.
        """
        done = self._close(item)
        held = self.workers.get(worker)
        kind = held.kind if held is not None else ""
        if done is not None:
            self._lost = 0
            done.holders.discard(worker)
            if done.holders:
                self._answered[item] = _Answer(done.name, worker, kind, digest, done.holders)
        else:
            self._compare(worker, item, kind, digest)
        if held is not None and held.item == item:
            self._free(worker)
            if done is not None:
                self._durations.add(now - held.since, done.samples)
        elif done is not None and not done.holders:  # late, from a worker taken for dead: the item may wait for another
            self.queue = deque(waiting for waiting in self.queue if waiting != item)
        return done is not None, self._advance(now)

    def _compare(self, worker: int, item: int, kind: str, digest: str) -> None:
        """Hold a second answer against the first."""
        first = self._answered.get(item)
        if first is None or worker not in first.holders:
            return
        self._leave(item, worker)
        if digest and first.digest and kind == first.kind and digest != first.digest:
            raise TwinsDiffer(
                f"{first.name}: workers {first.worker} and {worker} gave different answers (SHA-256 "
                f"{first.digest[:12]} and {digest[:12]}), expected the same bits of workers of one kind; a reward that "
                "is not the same twice needs ray.limits.twin_times = 0, else one of the two machines is at fault"
            )

    def failed(self, worker: int, item: int, reason: str, now: float) -> list[Command]:
        """``item`` raised on ``worker``, which goes on."""
        if worker in self.workers and self.workers[worker].item == item:
            self._free(worker)
        self._leave(item, worker)
        return self._blame(item, worker, reason) + self._advance(now)

    def lost(self, worker: int, reason: str, now: float, preempted: bool = False) -> list[Command]:
        """``worker`` has died, or is to be taken for dead; ``preempted`` with its node, which is not the item's fault.

        Raises:
            RolloutError: the limits are reached; it says of what, and why the last worker was lost.
        """
        if worker not in self.workers:
            return []
        item = self._forget(worker)
        self._lost += 1
        if item is not None:
            self._leave(item, worker)
        if self._lost > self.limits.preemptions * self.size:
            waiting = "; ".join(map(str, [*self.open.values()][:3]))
            raise RolloutError(
                f"ray.limits.preemptions = {self.limits.preemptions} (times {self.size} workers) is spent: "
                f"{self._lost} workers were lost and no item was done in between, while {len(self.open)} items wait "
                f"({waiting}); the last: worker {worker} {reason}"
            )
        commands: list[Command] = []
        if item is not None:
            commands = self._requeue(item) if preempted else self._blame(item, worker, reason)
        return commands + self._advance(now)

    def _blame(self, item: int, worker: int, reason: str) -> list[Command]:
        """Count a failure of an item, and let it be tried elsewhere."""
        if item in self.open:
            self.open[item].failed[worker] = reason
        return self._requeue(item)

    def _requeue(self, item: int) -> list[Command]:
        """Let an item that nobody is at any more wait again, or give it up where its failures are spent."""
        held = self.open.get(item)
        if held is None or held.holders:
            return []
        if len(held.failed) >= self.limits.crashes:
            self._close(item)
            return [GiveUp(item, held.name, held.failed)]
        self.queue.appendleft(item)
        return []

    def _leave(self, item: int, worker: int) -> None:
        """``worker`` is not at ``item`` any more."""
        if item in self.open:
            self.open[item].holders.discard(worker)
            self._single.get(self.open[item].samples, {}).pop(worker, None)
        if item in self._answered:
            self._answered[item].holders.discard(worker)
            if not self._answered[item].holders:
                del self._answered[item]

    def _close(self, item: int) -> _Item | None:
        """Take an item out of those that are open: it needs no twin any more."""
        done = self.open.pop(item, None)
        if done is not None:
            for worker in done.holders:
                self._single.get(done.samples, {}).pop(worker, None)
        return done

    def tick(self, now: float) -> list[Command]:
        """Kill the workers that are past their deadline, and give out the twins that are due.

        Raises:
            RolloutError: as ``lost``.
        """
        commands: list[Command] = []
        for number in [n for lease, held in self._leased.items() for n in self._overdue(lease, held, now)]:
            worker = self.workers[number]
            if worker.lease == START and not worker.placed and any(one.placed for one in self.workers.values()):
                worker.homeless = True  # no room for it yet: the others go on meanwhile
                self._lease(number, START, now)
                continue
            commands += [Kill(number), *self.lost(number, self._said(worker), now)]
        return commands + self._advance(now)

    def _overdue(self, lease: Lease, held: dict[int, None], now: float) -> list[int]:
        """The workers of a lease that are past it; they are in the order in which it began."""
        seconds = self._seconds(lease)
        return [*itertools.takewhile(lambda n: now >= self.workers[n].since + seconds, held)]

    def _said(self, worker: _Worker) -> str:
        """The message about a worker that is past its deadline."""
        if worker.item is None:
            return f"was not ready within ray.limits.start_s = {self.limits.start_s:g} s"
        assert worker.lease is not None  # it has an item
        name, seconds = str(self.open.get(worker.item, "a duplicate")), self._seconds(worker.lease)
        if worker.item in self.open:
            self.open[worker.item].late += 1
        return f"did not finish {name} within {seconds:.3g} s (ray.limits.item_s, item_times and item_floor_s set that)"

    def deadline(self) -> float:
        """The time at which ``tick`` is needed, if nothing happens before."""
        firsts = [(lease, next(iter(held))) for lease, held in self._leased.items() if held]
        ends = [self.workers[worker].since + self._seconds(lease) for lease, worker in firsts]
        return min([*ends, *(at for at, _ in self._due())], default=math.inf)

    def _seconds(self, lease: Lease) -> float:
        """Eq. (1) and (2), or the time of a start."""
        if lease == START:
            return self.limits.start_s
        samples, late = lease
        longer, tau = 2 ** min(late, DOUBLINGS), self._durations.p99
        if math.isnan(tau):
            return self.limits.item_s * longer
        return max(self.limits.item_floor_s, self.limits.item_times * samples * tau) * longer

    def _due(self) -> list[tuple[float, int]]:
        """Of each size of items the first worker whose item may have a twin, and when by Eq. (3); none where no idle
        worker could take it.
        """
        usual = self._durations.usual
        if not self._idle or self.queue or not self.limits.twin_times or math.isnan(usual):
            return []
        firsts = [(samples, next(iter(held))) for samples, held in self._single.items() if held]
        return [(self.workers[n].since + self.limits.twin_times * samples * usual, n) for samples, n in firsts]

    def _lease(self, worker: int, lease: Lease | None, now: float) -> None:
        """Begin a lease of a worker, or end its present one."""
        held = self.workers[worker]
        if held.lease is not None:
            self._leased.get(held.lease, {}).pop(worker, None)
        held.since, held.lease = now, lease
        if lease is not None:
            self._leased.setdefault(lease, {})[worker] = None

    def _free(self, worker: int) -> None:
        """A worker is idle."""
        held = self.workers[worker]
        self._lease(worker, None, held.since)
        held.item = None
        self._idle[worker] = None

    def _forget(self, worker: int) -> int | None:
        """A worker is gone; the item that it was at."""
        self._lease(worker, None, 0.0)
        self._idle.pop(worker, None)
        return self.workers.pop(worker).item

    def _advance(self, now: float) -> list[Command]:
        """Give waiting items to idle workers, twins to those that are left, and start workers while items need them."""
        commands: list[Command] = []
        while self._idle and self.queue and (pair := self._match()) is not None:
            self.queue.remove(pair[1])
            commands.append(self._assign(*pair, now))
        commands += self._retire()
        commands += self._give_twins(now)
        while len(self.workers) < min(self.size, len(self.open)):
            self.workers[self._started] = _Worker(now)
            self._lease(self._started, START, now)
            commands.append(Start(self._started))
            self._started += 1
        return commands

    def _match(self) -> tuple[int, int] | None:
        """The first waiting item that an idle worker has not failed at, and that worker."""
        for item in self.queue:
            for worker in self._idle:
                if worker not in self.open[item].failed:
                    return worker, item
        return None

    def _retire(self) -> list[Command]:
        """Make room for a new worker where an item waits that has failed on every one that there is room for."""
        for item in itertools.takewhile(lambda n: self.open[n].failed, self.queue):
            tried = self.open[item].failed
            if self._idle and all(number in tried or held.homeless for number, held in self.workers.items()):
                worker = next(iter(self._idle))
                self._forget(worker)
                return [Kill(worker)]
        return []

    def _give_twins(self, now: float) -> list[Command]:
        """Give the items that run for too long to idle workers as well."""
        commands: list[Command] = []
        while due := [number for at, number in self._due() if at <= now]:
            item = self.workers[due[0]].item
            assert item is not None  # it works
            held = self.open[item]
            del self._single[held.samples][due[0]]
            worker = next((w for w in self._idle if w not in held.failed), None)
            if worker is not None:
                held.twinned = True
                self.twins += 1
                commands.append(self._assign(worker, item, now))
        return commands

    def _assign(self, number: int, item: int, now: float) -> Assign:
        held, worker = self.open[item], self.workers[number]
        worker.item = item
        self._lease(number, (held.samples, held.late), now)
        del self._idle[number]
        slow = tuple(sorted(held.holders))
        held.holders.add(number)
        if not held.twinned:
            self._single.setdefault(held.samples, {})[number] = None
        return Assign(number, item, slow)
