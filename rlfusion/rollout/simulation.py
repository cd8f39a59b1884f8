"""A cluster in virtual time: the scheduler of items drives workers that are numbers, on nodes that come and go.

    pool = VirtualPool(1000, Limits(), Faults(kills=0.01), seed=0)
    report = train(pool, Learning(ranks=64), Rollouts(steps=20, items=2000, samples=4, lag=1))

Everything that the scheduler can meet is drawn with a seed: processes that die or hang, items that raise, answers that
come twice, slow machines, nodes that leave and return. It takes the place of Ray alone: which worker gets which item,
what is tried again and when, is decided by the ``Scheduler`` of real runs.
"""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rlfusion.rollout.commands import Assign, Command, GiveUp, Kill, RolloutError, Start
from rlfusion.rollout.item import version_for
from rlfusion.rollout.limits import Limits
from rlfusion.rollout.scheduler import Scheduler

NEVER = float("inf")


@dataclass(frozen=True)
class Faults:
    """What goes wrong, as chances of one start or item, and shares.

    Attributes:
        kills: its process dies on the way.
        hangs: it never answers.
        raises: the item raises.
        echoes: the answer comes again, 30 times as late, also from a process that was killed meanwhile.
        wrong: the answer has other bits.
        slow: share of the places that are slow.
        slowness: how many times as long anything takes there.
        outage_every_s: mean time between two nodes that leave; 0 for never.
        outage_s: after which a node returns.
    """

    kills: float = 0.0
    hangs: float = 0.0
    raises: float = 0.0
    echoes: float = 0.0
    wrong: float = 0.0
    slow: float = 0.0
    slowness: float = 4.0
    outage_every_s: float = 0.0
    outage_s: float = 120.0


NO_FAULTS = Faults()


def about(seconds: float, spread: float = 0.1) -> Callable[[random.Random], float]:
    """Draws times near ``seconds``, never below half of it."""
    return lambda draw: max(0.5 * seconds, draw.gauss(seconds, spread * seconds))


USUAL = about(1.0)


class VirtualPool:
    """``size`` places for workers on nodes of ``node`` places each, in virtual time.

    Attributes:
        now: seconds.
        answers: how often an answer to each item counted.
        given_up: items that failed for good.
        useful_s: seconds of work whose answer counted.
        lost: workers that were lost.
    """

    def __init__(
        self,
        size: int,
        limits: Limits,
        faults: Faults = NO_FAULTS,
        seed: int = 0,
        times: Callable[[random.Random], float] = USUAL,
        node: int = 8,
    ) -> None:
        self.scheduler, self.faults, self.times, self.node = Scheduler(size, limits), faults, times, node
        self.size, self.draw, self.now = size, random.Random(seed), 0.0
        self.slow = [self.draw.random() < faults.slow for _ in range(size)]
        self.free, self.places, self.pending = [*range(size)], dict[int, int](), list[int]()
        self.away: set[int] = set()
        self.answers: dict[int, int] = {}
        self.given_up: list[GiveUp] = []
        self.useful_s, self.lost = 0.0, 0
        self._work: dict[int, tuple[int, float]] = {}
        self._at: Counter[int] = Counter()
        self._events: list[tuple[float, int, tuple]] = []
        self._order = itertools.count()
        if faults.outage_every_s:
            self._post(self.draw.expovariate(1 / faults.outage_every_s), "leaves")

    def submit(self, names: Sequence[str], samples: Sequence[int]) -> range:
        """Give items to the scheduler: their numbers."""
        numbers, commands = self.scheduler.add(names, samples, self.now)
        self._execute(commands)
        return numbers

    def drop(self, items: Collection[int]) -> None:
        """Nobody waits for these items any more."""
        self._execute(self.scheduler.drop(items, self.now))

    def wait(self, items: Collection[int]) -> None:
        """Until all of them are answered.

        Raises:
            RolloutError: the scheduler gives up.
        """
        for item in items:
            while item not in self.answers:
                if any(one.item == item for one in self.given_up):
                    raise RolloutError(f"item {item} was given up")
                self._next(NEVER)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self.now < until:
            self._next(until)

    def _next(self, until: float) -> None:
        """The next thing that happens, but for nothing after ``until``."""
        at, deadline = self._events[0][0] if self._events else NEVER, self.scheduler.deadline()
        if min(at, deadline) >= until:
            self.now = until
            return
        if min(at, deadline) == NEVER:
            raise AssertionError("nothing would ever happen again")
        if at < deadline:
            self.now, _, (kind, *held) = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(*held)
        else:
            self.now = max(self.now, deadline)
            self._execute(self.scheduler.tick(self.now))

    def _post(self, delay: float, *event: object) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), event))

    def _execute(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Start):
                self.pending.append(command.worker)
            elif isinstance(command, Kill):
                self._remove(command.worker)
            elif isinstance(command, GiveUp):
                self.given_up.append(command)
            else:
                assert command.worker in self.places, "an item for a worker that is not there"
                assert command.worker not in self._work, "two items for one worker"
                assert sum(item == command.item for item, _ in self._work.values()) < 2 or self.size > 99, (
                    "a third twin"
                )
                self._work[command.worker] = command.item, self.now
                self._begin(command)
        self._place()

    def _place(self) -> None:
        """Give free places to the workers that wait for one."""
        while self.pending and self.free:
            worker = self.pending.pop(0)
            self.places[worker] = heapq.heappop(self.free)
            self.scheduler.placed(worker, self.now)
            self._begin(Start(worker))

    def _begin(self, command: Start | Assign) -> None:
        """Draw what becomes of a start or an item."""
        f, worker = self.faults, command.worker
        delay = self.times(self.draw) * (f.slowness if self.slow[self.places[worker]] else 1.0)
        event: tuple = ("ready", worker) if isinstance(command, Start) else ("result", worker, command.item)
        fate = self.draw.random()
        if fate < f.kills:
            self._post(delay, "dies", worker)
        elif isinstance(command, Assign) and fate >= 1 - f.raises:
            self._post(delay, "raises", worker, command.item)
        elif fate >= f.kills + f.hangs:
            self._post(delay, *event)
        if self.draw.random() < f.echoes:
            self._post(30 * delay, *event)

    def _remove(self, worker: int) -> None:
        """A worker is gone, and its place is free again, if its node is there."""
        self._leave(worker)
        if worker in self.pending:
            self.pending.remove(worker)
        place = self.places.pop(worker, None)
        if place is not None and place // self.node not in self.away:
            heapq.heappush(self.free, place)

    def _leave(self, worker: int) -> None:
        """A worker is at no item any more."""
        item, _ = self._work.pop(worker, (-1, 0.0))
        self._at[item] -= 1

    def _ready(self, worker: int) -> None:
        self._execute(self.scheduler.ready(worker, self.now))

    def _dies(self, worker: int, preempted: bool = False) -> None:
        if worker in self.places:
            self.lost += 1
            self._remove(worker)
            self._execute(self.scheduler.lost(worker, "died", self.now, preempted))

    def _raises(self, worker: int, item: int) -> None:
        if self._work.get(worker, (None,))[0] == item:
            self._leave(worker)
            self._execute(self.scheduler.failed(worker, item, "raised", self.now))

    def _result(self, worker: int, item: int) -> None:
        began = self._work.get(worker)
        if began is not None and began[0] == item:
            self._leave(worker)
        digest = f"{item}" if self.draw.random() >= self.faults.wrong else f"not {item}"
        first, commands = self.scheduler.result(worker, item, self.now, digest)
        if first:
            self.answers[item] = self.answers.get(item, 0) + 1
            self.useful_s += self.now - began[1] if began is not None and began[0] == item else 0.0
        self._execute(commands)

    def _leaves(self) -> None:
        """A node goes, with all workers on it."""
        node = self.draw.randrange(-(-self.size // self.node))
        self._post(self.draw.expovariate(1 / self.faults.outage_every_s), "leaves")
        if node in self.away:
            return
        self.away.add(node)
        self.free = [place for place in self.free if place // self.node != node]
        heapq.heapify(self.free)
        for worker in [w for w, place in self.places.items() if place // self.node == node]:
            self._dies(worker, preempted=True)
        self._post(self.faults.outage_s, "returns", node)

    def _returns(self, node: int) -> None:
        self.away.discard(node)
        for place in range(node * self.node, min(self.size, (node + 1) * self.node)):
            heapq.heappush(self.free, place)
        self._place()


@dataclass(frozen=True)
class Learning:
    """A group of ranks: how long its update of a rollout takes, and how often one of them is lost with it."""

    ranks: int = 64
    seconds: float = 10.0
    spread: float = 0.05
    kills: float = 0.0
    restart_s: float = 60.0
    checkpoint_every: int = 8


@dataclass(frozen=True)
class Rollouts:
    """So many rollouts of equal items, collected up to ``lag`` ahead."""

    steps: int
    items: int
    samples: int
    lag: int = 0


@dataclass(frozen=True)
class Report:
    """What a virtual run did.

    Attributes:
        consumed: (step, item number) of each item that the final weights come from, in the order of learning.
        step_s: seconds a step.
        workers, ranks: the share of their time in which they did work that counted.
        lost: workers; groups: ranks that were lost with all of their group.
        replayed: steps that were done again after it.
        twins: items that were given out twice.
    """

    consumed: list[tuple[int, int]]
    step_s: float
    workers: float
    ranks: float
    lost: int
    groups: int
    replayed: int
    twins: int


def train(pool: VirtualPool, learning: Learning, rollouts: Rollouts, seed: int = 0) -> Report:
    """Learn from rollouts in order, each under the weights that ``version_for`` says, while the pool works ahead."""
    r, draw = rollouts, random.Random(seed)
    submitted: dict[int, range] = {}
    consumed: list[tuple[int, int]] = []
    done = groups = replayed = 0
    began, learned_s = pool.now, 0.0

    def publish(version: int) -> None:
        for step in range(version, min(version + r.lag, r.steps - 1) + 1):
            if version_for(step, r.lag, learning.checkpoint_every) == version:
                names = [f"item {n} of iteration {step}" for n in range(r.items)]
                submitted[step] = pool.submit(names, [r.samples] * r.items)

    publish(0)
    while done < r.steps:
        pool.wait(submitted[done])
        seconds = max(about(learning.seconds, learning.spread)(draw) for _ in range(learning.ranks))
        if draw.random() < 1 - (1 - learning.kills) ** learning.ranks:
            groups, back = groups + 1, done // learning.checkpoint_every * learning.checkpoint_every
            pool.advance(seconds * draw.random())
            pool.drop([n for numbers in submitted.values() for n in numbers])
            submitted, replayed, done = {}, replayed + done - back, back
            consumed = [one for one in consumed if one[0] < back]
            pool.advance(learning.restart_s)
            publish(done)
            continue
        consumed += [(done, n) for n in submitted.pop(done)]
        pool.advance(seconds)
        learned_s += learning.seconds
        done += 1
        publish(done)
    elapsed = pool.now - began
    used = pool.useful_s / (pool.size * elapsed), min(1.0, learned_s / elapsed)
    return Report(consumed, elapsed / r.steps, *used, pool.lost, groups, replayed, pool.scheduler.twins)
