"""The actor of a rollout worker: a process that builds a task from plain data and runs items of one run."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch

from rlfusion.common.code_files import receive
from rlfusion.common.numerics import fingerprint
from rlfusion.common.weights import Weights, WeightsError
from rlfusion.rollout.backend import Settings
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.ray_placement import of_worker
from rlfusion.rollout.ray_stacks import BESIDE, here
from rlfusion.rollout.task import Recipe, run_item
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.rollout.wire import Acted, to_wire, to_wire_apart

Asked = tuple[str, int, str]
"""What ``Acted`` is on the wire."""


class Worker:
    """An actor: a task, and the weights that it last loaded."""

    def build(
        self,
        run: str,
        recipe: tuple[str, str],
        blobs: Mapping[str, bytes],
        paths: list[str],
        threads: int,
        texts: Mapping[str, str],
    ) -> dict[str, str]:
        """Make the task of ``recipe`` (builder, config), whose modules may lie in the driver's ``paths``, for ``run``;
        ``texts`` are the files of the user's own code (``code_files.receive``).

        The answer is this process's numerics fingerprint.
        """
        sys.path.extend(path for path in paths if path not in sys.path)
        torch.set_num_threads(threads)
        receive(texts)
        self.task = Recipe.from_text(*recipe, blobs).build()
        self.acting = Acted(run, -1, "")
        return fingerprint()

    def where(self) -> str:
        """The node that this process has its place on."""
        return ray.get_runtime_context().get_node_id()

    def stacks(self) -> str:
        """Where each thread of the process stands."""
        return here()

    def run(self, item: dict[str, Any], asked: Asked, blob: list[ray.ObjectRef]) -> tuple[Asked, str, bytes]:
        """Run one item under the weights that are ``asked`` for, which ``blob`` holds: what acted, and its walks."""
        walked = self.walk(item, asked, blob)
        return (self.acting[:], *to_wire(walked))

    def run_apart(self, item: dict[str, Any], asked: Asked, blob: list[ray.ObjectRef]) -> tuple[tuple, np.ndarray]:
        """The same in two, of which only the first goes to who asks."""
        small, states = to_wire_apart(self.walk(item, asked, blob))
        return (self.acting[:], *small), states

    def walk(self, item: dict[str, Any], asked: Asked, blob: list[ray.ObjectRef]) -> Trajectory:
        """The walks of an item."""
        work, (run, version, sha256) = WorkItem.from_json(item), asked
        if work.version != version:
            raise WeightsError(f"{work}: got weights of version {version}")
        if run != self.acting.run:
            raise WeightsError(f"{work} is of run {run!r}, expected items of run {self.acting.run!r}")
        if sha256 != self.acting.sha256:
            self.load(Weights(version, sha256, ray.get(blob[0])))
        elif version != self.acting.version:  # the same weights after another update
            self.acting = self.acting._replace(version=version)
        return run_item(self.task, work)

    def load(self, weights: Weights) -> None:
        """Act under these weights from here on."""
        self.acting = Acted(self.acting.run, -1, "")  # what is read file by file may on the way be of two versions
        weights.load_into(self.task.policy)
        self.acting = Acted(self.acting.run, weights.version, weights.sha256)


def actor_of(kind: type[Worker], settings: Settings) -> Any:
    """The actors of these workers; ``stacks`` is answered beside their work."""
    cpus, gpus = settings.cpus_per_worker, settings.gpus_per_worker
    placed: Any = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(settings.resources)}
    placed |= {"concurrency_groups": {BESIDE: 1}, **of_worker(settings.placing)}
    return ray.remote(max_restarts=0, max_task_retries=0, **placed)(kind)
