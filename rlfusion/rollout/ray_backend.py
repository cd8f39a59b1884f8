"""Rollouts on Ray actors. Ray is the process, placement and object layer; the scheduler decides.

What crosses to a worker is plain data: the recipe of its task, items as dicts, and (version, SHA-256, blob) of the
weights with every item, the blob by reference and fetched once a version. What comes back is (run, version, SHA-256) of
what acted, a JSON text and a safetensors blob. An answer of another run, or under other weights than were asked for,
is refused. A worker never holds an object of the driver's, and never puts one into the store.
"""

import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from rlfusion.common.code_files import texts_of
from rlfusion.common.errors import StorageError
from rlfusion.common.numerics import differences, fingerprint
from rlfusion.common.weights import Weights, WeightsError
from rlfusion.rollout.backend import Away, Pending, Pool, Settings, check_versions
from rlfusion.rollout.bundle import Keep
from rlfusion.rollout.commands import Assign, Command, GiveUp, RolloutError, Start
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.object_store import InFlight
from rlfusion.rollout.ray_cluster import first_line, shared_cluster, smallest_store
from rlfusion.rollout.ray_stacks import stacks_of
from rlfusion.rollout.ray_worker import Asked, Worker, actor_of
from rlfusion.rollout.scheduler import Scheduler
from rlfusion.rollout.task import Recipe
from rlfusion.rollout.wire import Acted, digest, from_wire
from rlfusion.training.stacks import write_stacks

POLL_S = 0.5
MOST_STACKS = 20
"""Times that it is kept where a slow worker stands."""
NO_IMPORT = "failed to import on the worker"
"""What Ray says where a worker has not the modules of what it shall run."""
_log = logging.getLogger(__name__)


class _Call(NamedTuple):
    """The present work of a worker: to say where it is, to build its task, or an item."""

    worker: int
    work: Literal["place", "build", "item"]
    item: int = -1
    asked: Acted | None = None
    states: Any = None


class RayBackend(Pool):
    """A pool of ``settings.workers`` actors in the cluster at ``settings.address`` or, where that is "", the one that
    this process is connected to, or else a private one. The actors start with the first items and again after failures;
    submissions go to them in order, and the next one fills the workers that the one before leaves idle. ``keep`` says
    where an item that fails on every worker is kept.
    """

    def __init__(self, recipe: Recipe, settings: Settings, keep: Keep | None = None) -> None:
        self.settings, self.keep, self._given = settings, keep, recipe
        self._stack = ExitStack()
        cpus = max(1, math.ceil(settings.workers * settings.cpus_per_worker))
        gpus = math.ceil(settings.workers * settings.gpus_per_worker)
        self._stack.enter_context(shared_cluster(settings, cpus, gpus))
        text, paths = recipe.text, [os.path.abspath(path) for path in sys.path]
        blobs, texts = ray.put(dict(recipe.blobs)), texts_of(recipe.config)
        self._name = f"{keep.run if keep else 'rollouts'}-{secrets.token_hex(4)}"
        self._recipe = (self._name, (recipe.builder, text), blobs, paths, settings.threads, texts)
        self._actor = actor_of(Worker, settings)
        self._thread = ThreadPoolExecutor(1, "rlfusion-rollout")
        self._closing = threading.Event()
        self._published: tuple[str, Any] = ("", None)
        self._moved: Counter[str] = Counter()
        self._looked = 0
        self._waiting: deque[_Job] = deque()
        self._begin()

    def _begin(self) -> None:
        self._scheduler = Scheduler(max(1, self.settings.workers), self.settings.limits)
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._acted: dict[int, str] = {}
        self._calls: dict[ray.ObjectRef, _Call] = {}
        self._jobs: list[_Job] = []
        self._errors: dict[int, Exception] = {}

    def require_room(self, weights: int, versions: int, answer: int) -> None:
        frozen = sum(map(len, self._given.blobs.values()))
        InFlight(frozen, weights, versions, answer, self.settings.workers).require_room(smallest_store())

    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        done = self._submit(_Job(list(items), weights, apart=False))
        return lambda: [from_wire(*wire) for wire, _ in done()]

    def submit_apart(self, items: Sequence[WorkItem], weights: Weights) -> Callable[[], list[Away]]:
        done = self._submit(_Job(list(items), weights, apart=True))
        return lambda: [Away(from_wire(*wire[:2]), wire[2], states) for wire, states in done()]

    def _submit(self, job: "_Job") -> Callable[[], list[tuple[tuple, Any]]]:
        check_versions(job.items, job.weights)
        if self._closing.is_set():
            raise RolloutError("the rollout backend is closed")
        self._waiting.append(job)
        return self._thread.submit(self._run, job).result

    def close(self) -> None:
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        self._kill_all()
        self._stack.close()

    def _run(self, job: "_Job") -> list[tuple[tuple, Any]]:
        """Work until ``job`` is done, on it and on those behind it; if the pool fails, all workers are killed and the
        next one begins afresh.
        """
        try:
            if job.again:
                self._add(job)
            while not job.ended:
                if self._closing.is_set():
                    raise RolloutError("the rollout backend was closed while items were running")
                self._take_in()
                self._execute(self._poll())
        except BaseException:
            self._kill_all()
            raise
        if job.error is not None:
            raise job.error
        return [job.results[number] for number in job.numbers]

    def _take_in(self) -> None:
        """Give the submissions that have come to the scheduler, in order."""
        while self._waiting:
            self._add(self._waiting.popleft())

    def _add(self, job: "_Job") -> None:
        self._jobs.append(job)
        job.blob, job.results, job.again = self._publish(job.weights), {}, False
        names, samples = [str(item) for item in job.items], [len(item) for item in job.items]
        job.numbers, commands = self._scheduler.add(names, samples, time.monotonic())
        self._execute(commands)

    def _publish(self, weights: Weights) -> ray.ObjectRef:
        """The reference of the weights' blob, put into the store once."""
        if self._published[0] != weights.sha256:
            self._published = (weights.sha256, ray.put(weights.blob))
        return self._published[1]

    def _execute(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Start):
                self._actors[command.worker] = actor = self._actor.remote()
                self._calls[actor.where.remote()] = _Call(command.worker, "place")
                self._calls[actor.build.remote(*self._recipe)] = _Call(command.worker, "build")
            elif isinstance(command, Assign):
                self._assign(command)
            elif isinstance(command, GiveUp):
                self._give_up(command)
            else:
                if any(call.worker == command.worker for call in self._calls.values()):
                    self._look_at(command.worker, "is past its time")
                self._kill(command.worker)

    def _assign(self, command: Assign) -> None:
        """Give an item to its worker, unless its submission has just ended."""
        if command.item not in self._scheduler.open:
            self._execute(self._scheduler.result(command.worker, command.item, time.monotonic())[1])
            return
        for slow in command.slow:
            self._look_at(slow, "takes long, and its item is given to another, too")
        job = self._job_of(command.item)
        item = job.items[command.item - job.numbers.start].to_json()
        asked = Acted(self._name, job.weights.version, job.weights.sha256)
        actor, given = self._actors[command.worker], (item, asked[:], [job.blob])
        answer, states = (
            actor.run_apart.options(num_returns=2).remote(*given) if job.apart else (actor.run.remote(*given), None)
        )
        self._calls[answer] = _Call(command.worker, "item", command.item, asked, states)

    def _look_at(self, worker: int, why: str) -> None:
        """Keep where a worker that takes long stands, in the run's folder."""
        if self.keep is None or self._looked >= MOST_STACKS:
            return
        self._looked += 1
        try:
            file = write_stacks(self.keep.folder.parent, "worker", stacks_of({worker: self._actors[worker]}))
        except StorageError:  # a disk that is full need not end what goes on elsewhere
            return
        _log.warning("worker %d %s; where it stands: %s", worker, why, file)

    def _job_of(self, item: int) -> "_Job":
        return next(job for job in self._jobs if item in job.numbers)

    def _poll(self) -> list[Command]:
        """Wait for an answer, a deadline or half a second, and say what follows."""
        wait = min(POLL_S, max(0.0, self._scheduler.deadline() - time.monotonic()))
        if not ray.wait(list(self._calls), num_returns=1, timeout=wait)[0]:
            return self._scheduler.tick(time.monotonic())
        answered, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for answer in answered:
            if answer in self._calls:  # else its worker was killed meanwhile
                self._execute(self._answer(answer))
        return self._scheduler.tick(time.monotonic())

    def _answer(self, answer: ray.ObjectRef) -> list[Command]:
        call = self._calls.pop(answer)
        try:
            value = ray.get(answer, timeout=self.settings.limits.item_s)
        except RayTaskError as error:
            return self._raised(call, error)
        except RayActorError as error:
            if error.actor_init_failed:
                raise _unstarted(error, call.worker) from error
            return self._died(call.worker, error)
        except RayError as error:  # the worker, its node or its answer is gone
            return self._died(call.worker, error)
        if call.work == "place":
            self._nodes[call.worker] = value
            return self._scheduler.placed(call.worker, time.monotonic())
        if call.work == "build":
            _warn_of_other_numerics(call.worker, value)
            return self._scheduler.ready(call.worker, time.monotonic(), json.dumps(value, sort_keys=True))
        acted, *wire = value
        self._count(call, acted, wire)
        return self._refused(call, acted) if Acted(*acted) != call.asked else self._result(call, tuple(wire))

    def moved(self) -> dict[str, int]:
        held, self._moved = self._moved, Counter()
        return dict(held)

    def _count(self, call: _Call, acted: Asked, wire: Sequence[str | bytes]) -> None:
        """The bytes of an answer, and those of the weights where its worker did not act under them before."""
        self._moved["answers_from_workers"] += sum(map(len, wire))
        if self._acted.get(call.worker) != acted[2]:
            self._acted[call.worker] = acted[2]
            held = [job.weights for job in self._jobs if job.weights.sha256 == acted[2]]
            self._moved["weights_to_workers"] += len(held[0].blob) if held else 0

    def _refused(self, call: _Call, acted: Asked) -> list[Command]:
        """An answer of another run or under other weights is not one; the worker that gave it is not asked again."""
        error = WeightsError(f"worker {call.worker} answered for {Acted(*acted)}, expected {call.asked}")
        _log.warning("%s: it is killed, and what it did is done again", error)
        self._errors[call.item] = error
        self._kill(call.worker)
        return self._scheduler.lost(call.worker, f"answered for {Acted(*acted)}", time.monotonic())

    def _result(self, call: _Call, wire: tuple) -> list[Command]:
        """The worker gets its next item before the answer is unpacked, which waits until all are there."""
        held = digest(from_wire(*wire[:2]), *wire[2:]) if self._scheduler.twinned(call.item) else ""
        first, commands = self._scheduler.result(call.worker, call.item, time.monotonic(), held)
        if first:
            job = self._job_of(call.item)
            job.results[call.item] = (wire, call.states)
            self._errors.pop(call.item, None)
            self._leave(job)
        return commands

    def _raised(self, call: _Call, error: RayTaskError) -> list[Command]:
        """An error of the worker itself: of its start it ends the run, of an item it is that item's."""
        cause = _cause(error, call.worker)
        if call.work != "item" or NO_IMPORT in str(error):
            raise cause from error
        _log.warning("worker %d failed: %s: %s", call.worker, type(cause).__name__, first_line(cause))
        self._errors[call.item] = cause
        reason = f"raised {type(cause).__name__}: {first_line(cause)}"
        return self._scheduler.failed(call.worker, call.item, reason, time.monotonic())

    def _give_up(self, command: GiveUp) -> None:
        """An item is poisonous: it is kept, and its submission ends with its error, or with its workers' end."""
        job = self._job_of(command.item)
        last = [*command.failed.values()][-1]
        error = self._errors.pop(command.item, None) or RolloutError(f"{command.name}: its worker {last}")
        workers = ", ".join(map(str, command.failed))
        error.add_note(f"on each of the Ray workers {workers}: ray.limits.crashes = {len(command.failed)} is spent")
        if self.keep is not None:
            item = job.items[command.item - job.numbers.start]
            folder = self.keep.write(self._given, item, job.weights, command.failed, error)
            error.add_note(f"it is kept: rlfusion reproduce {folder}")
        job.error = error
        self._leave(job)
        self._execute(self._scheduler.drop(job.numbers, time.monotonic()))

    def _leave(self, job: "_Job") -> None:
        if job.ended:
            self._jobs = [other for other in self._jobs if other is not job]

    def _died(self, worker: int, error: RayError) -> list[Command]:
        preempted = isinstance(error, ActorUnavailableError) or self._nodes.get(worker) in _lost_nodes()
        what = "was lost with its node" if preempted else "died"
        _log.warning("worker %d %s: %s", worker, what, first_line(error))
        self._kill(worker)
        return self._scheduler.lost(worker, f"{what}: {first_line(error)}", time.monotonic(), preempted)

    def _kill(self, worker: int) -> None:
        """Kill one actor and forget what it was doing."""
        self._calls = {answer: call for answer, call in self._calls.items() if call.worker != worker}
        self._nodes.pop(worker, None)
        ray.kill(self._actors.pop(worker), no_restart=True)

    def _kill_all(self) -> None:
        for worker in list(self._actors):
            self._kill(worker)
        for job in self._jobs:
            job.again = True
        self._begin()


class _Job:
    """One submission on its way: its results by item, or the error that ended it; ``again`` where the pool failed. A
    result is what came, and, of walks that stay ``apart``, where these are.
    """

    def __init__(self, items: list[WorkItem], weights: Weights, apart: bool) -> None:
        self.items, self.weights, self.apart = items, weights, apart
        self.blob: ray.ObjectRef | None = None
        self.numbers = range(0)
        self.results: dict[int, tuple[tuple, Any]] = {}
        self.error: Exception | None = None
        self.again = False

    @property
    def ended(self) -> bool:
        return self.error is not None or len(self.results) == len(self.items)


def _lost_nodes() -> set[str]:
    """The nodes that were there and are not any more."""
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def _cause(error: RayTaskError, worker: int) -> Exception:
    """The error of the worker, as this process would have raised it."""
    if NO_IMPORT in str(error):
        return _unstarted(error, worker)
    cause = error.cause if isinstance(error.cause, Exception) else RolloutError(first_line(error))
    cause.add_note(f"on Ray worker {worker}")
    return cause


def _unstarted(error: Exception, worker: int) -> RolloutError:
    """Of a worker that cannot even be made: its own error is the last line of its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[-1] if lines else type(error).__name__
    return RolloutError(
        f"Ray worker {worker} cannot start: {message}; expected rlfusion and what the task needs installed on every "
        "node, in the Python that Ray runs there"
    )


def _warn_of_other_numerics(worker: int, theirs: dict[str, str]) -> None:
    for text in differences(theirs, fingerprint()):
        _log.warning("worker %d may differ from this process in its last bits (%s)", worker, text)
