"""Rollouts on Ray actors. Ray is the process, placement and object layer; the scheduler decides.

What crosses to a worker is plain data: the recipe of its task, items as dicts, and (version, SHA-256, blob) of the
weights with every item, the blob by reference and fetched once a version. What comes back is a JSON text and a
safetensors blob. A worker never holds an object of the driver's, and never puts one into the store.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlfusion.common.code_files import receive, texts_of
from rlfusion.common.numerics import differences, fingerprint
from rlfusion.common.weights import Weights, WeightsError
from rlfusion.rollout.backend import Backend, Pending, Settings, check_versions
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.ray_cluster import first_line, shared_cluster
from rlfusion.rollout.scheduler import Assign, Command, RolloutError, Scheduler, Start
from rlfusion.rollout.task import Recipe, run_item
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.rollout.wire import from_wire, to_wire

POLL_S = 0.5
NO_IMPORT = "failed to import on the worker"
"""What Ray says where a worker has not the modules of what it shall run."""
_log = logging.getLogger(__name__)


class Worker:
    """An actor: a task, and the weights that it last loaded."""

    def build(
        self,
        recipe: tuple[str, str],
        blobs: Mapping[str, bytes],
        paths: list[str],
        threads: int,
        texts: Mapping[str, str],
    ) -> dict[str, str]:
        """Make the task of ``recipe`` (builder, config), whose modules may lie in the driver's ``paths``; ``texts`` are
        the files of the user's own code (``code_files.receive``).

        The answer is this process's numerics fingerprint.
        """
        sys.path.extend(path for path in paths if path not in sys.path)
        torch.set_num_threads(threads)
        receive(texts)
        self.task = Recipe.from_text(*recipe, blobs).build()
        self.loaded = ""
        return fingerprint()

    def run(self, item: dict[str, Any], version: int, sha256: str, blob: list[ray.ObjectRef]) -> tuple[str, bytes]:
        """Run one item under the weights (version, sha256), which ``blob`` holds."""
        work = WorkItem.from_json(item)
        if work.version != version:
            raise WeightsError(f"{work}: got weights of version {version}")
        if sha256 != self.loaded:
            Weights(version, sha256, ray.get(blob[0])).load_into(self.task.policy)
            self.loaded = sha256
        return to_wire(run_item(self.task, work))


class _Call(NamedTuple):
    """The present work of a worker: an item, or (None) building its task."""

    worker: int
    item: int | None


class RayBackend(Backend):
    """A pool of Ray actors. Connects to the cluster of ``settings``, or to the one that this process already uses.

    Submitted items run in the order of submission, driven by one thread of this object, while the caller works.
    """

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        self.settings = settings
        self._stack, text = ExitStack(), recipe.text
        cpus, gpus = (max(1, settings.workers) * n for n in (settings.cpus_per_worker, settings.gpus_per_worker))
        self._stack.enter_context(shared_cluster(settings, math.ceil(cpus), math.ceil(gpus)))
        paths = [os.path.abspath(path) for path in sys.path]
        blobs, texts = ray.put(dict(recipe.blobs)), texts_of(recipe.config)
        self._recipe = ((recipe.builder, text), blobs, paths, settings.threads, texts)
        self._actor: Any = ray.remote(
            num_cpus=settings.cpus_per_worker, num_gpus=settings.gpus_per_worker, max_restarts=0, max_task_retries=0
        )(Worker)
        self._thread = ThreadPoolExecutor(1, "rlfusion-rollout")
        self._closing = threading.Event()
        self._published: tuple[str, Any] = ("", None)
        self._begin()

    def _begin(self) -> None:
        self._scheduler = Scheduler(max(1, self.settings.workers), self.settings.limits)
        self._actors: dict[int, Any] = {}
        self._calls: dict[ray.ObjectRef, _Call] = {}

    def submit(self, items: Sequence[WorkItem], weights: Weights) -> Pending:
        check_versions(items, weights)
        if self._closing.is_set():
            raise RolloutError("the rollout backend is closed")
        return self._thread.submit(self._run, list(items), weights).result

    def close(self) -> None:
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        self._kill_all()
        self._stack.close()

    def _run(self, items: list[WorkItem], weights: Weights) -> list[Trajectory]:
        """The life of one submission; if it fails, all workers are killed and the next one begins afresh."""
        job = _Job(items, weights, self._publish(weights))
        try:
            job.numbers, commands = self._scheduler.add(
                [str(item) for item in items], [len(item) for item in items], time.monotonic()
            )
            self._execute(commands, job)
            while self._scheduler.open:
                if self._closing.is_set():
                    raise RolloutError("the rollout backend was closed while items were running")
                self._execute(self._poll(job), job)
        finally:
            if self._scheduler.open:
                self._kill_all()
        return [job.results[number] for number in job.numbers]

    def _publish(self, weights: Weights) -> ray.ObjectRef:
        """The reference of the weights' blob, put into the store once."""
        if self._published[0] != weights.sha256:
            self._published = (weights.sha256, ray.put(weights.blob))
        return self._published[1]

    def _execute(self, commands: Sequence[Command], job: "_Job") -> None:
        for command in commands:
            if isinstance(command, Start):
                self._actors[command.worker] = actor = self._actor.remote()
                self._calls[actor.build.remote(*self._recipe)] = _Call(command.worker, None)
            elif isinstance(command, Assign):
                item = job.items[command.item - job.numbers.start].to_json()
                answer = self._actors[command.worker].run.remote(
                    item, job.weights.version, job.weights.sha256, [job.blob]
                )
                self._calls[answer] = _Call(command.worker, command.item)
            else:
                self._kill(command.worker)

    def _poll(self, job: "_Job") -> list[Command]:
        """Wait for an answer, a deadline or half a second, and say what follows."""
        wait = min(POLL_S, max(0.0, self._scheduler.deadline() - time.monotonic()))
        answered, _ = ray.wait(list(self._calls), num_returns=1, timeout=wait)
        commands = [command for answer in answered for command in self._answer(answer, job)]
        return commands + self._scheduler.tick(time.monotonic())

    def _answer(self, answer: ray.ObjectRef, job: "_Job") -> list[Command]:
        call = self._calls.pop(answer)
        try:
            value = ray.get(answer, timeout=self.settings.limits.item_s)
        except RayTaskError as error:
            raise _cause(error, call.worker) from error
        except RayActorError as error:
            if error.actor_init_failed:
                raise _unstarted(error, call.worker) from error
            return self._died(call.worker, error)
        except RayError as error:  # the worker, its node or its answer is gone
            return self._died(call.worker, error)
        if call.item is None:
            _warn_of_other_numerics(call.worker, value)
            return self._scheduler.ready(call.worker, time.monotonic())
        first, commands = self._scheduler.result(call.worker, call.item, time.monotonic())
        if first:
            job.results[call.item] = from_wire(*value)
        return commands

    def _died(self, worker: int, error: RayError) -> list[Command]:
        self._kill(worker)
        return self._scheduler.lost(worker, f"died: {first_line(error)}", time.monotonic())

    def _kill(self, worker: int) -> None:
        """Kill one actor and forget what it was doing."""
        self._calls = {answer: call for answer, call in self._calls.items() if call.worker != worker}
        ray.kill(self._actors.pop(worker), no_restart=True)

    def _kill_all(self) -> None:
        for worker in list(self._actors):
            self._kill(worker)
        self._begin()


class _Job:
    """One submission on its way."""

    def __init__(self, items: list[WorkItem], weights: Weights, blob: ray.ObjectRef) -> None:
        self.items, self.weights, self.blob = items, weights, blob
        self.numbers = range(0)
        self.results: dict[int, Trajectory] = {}


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
