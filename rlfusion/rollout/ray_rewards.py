"""Rewards in Ray actors, each with a runtime environment of its own: for dependencies that conflict with ours.

As many actors a reward as are wanted, for the workers and the driver alike, which ask them in turn. What crosses is
the two frames of ``rewards.exchange``, by the rules of the HTTP service: the values are those of the reward at home,
bit for bit, and what cannot be scored is an error of its item. An actor that dies is started anew by Ray, and one that
hangs by its watch (``ray_kept``), as scoring needs no memory.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch import Tensor, nn

from rlfusion.common.code_files import receive, texts_of
from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond
from rlfusion.rewards import Reward, asks, build
from rlfusion.rewards.base import RewardFailure, RewardUnavailable
from rlfusion.rewards.grouped import MayGroup
from rlfusion.rewards.remote.exchange import answer, answered, ask, asked, greet, greeted, table_of
from rlfusion.rewards.remote.frames import digest_of
from rlfusion.rewards.remote.offer import Limits, Offer, require_servable
from rlfusion.rewards.remote.tables import Tables, UnknownTable
from rlfusion.rollout.backend import Settings
from rlfusion.rollout.placement import require_place
from rlfusion.rollout.ray_cluster import shared_cluster
from rlfusion.rollout.ray_kept import BESIDE, RESTARTS, Named, kept
from rlfusion.rollout.ray_placement import in_actor, nodes
from rlfusion.rollout.reward_envs import require_possible


class RewardActor:
    """A reward, made anew wherever Ray starts it."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        paths: list[str],
        threads: int,
        gpu: bool,
        texts: Mapping[str, str],
    ) -> None:
        receive(texts)
        sys.path.extend(path for path in paths if path not in sys.path)  # last: the environment's own come first
        torch.set_num_threads(threads)
        self.device = "cuda" if gpu else "cpu"

        def make(task_info: dict[str, Any]) -> Reward:
            reward = build(name, {name: options} if options else {}, task_info)
            return reward.to(self.device) if isinstance(reward, nn.Module) else reward

        self.offer, self.tables = Offer(name, options, asks(name), make), Tables()

    def hello(self, frame: bytes) -> dict[str, Any]:
        """Describe the reward that is served for the task info of the frame (``remote.Served``), and remember that."""
        task_info, table = greeted(frame), digest_of(frame)
        served = self.offer.served(task_info, Limits(), table)
        self.tables.take(table, task_info, len(frame))
        return asdict(served)

    def score(self, frame: bytes) -> bytes:
        """The answer to the question of the frame; nothing where this actor, started anew, does not know its table."""
        try:
            question = asked(frame, self.tables)
        except UnknownTable:
            return b""
        return answer(*self.offer.reward(question.task_info, question.table), question, self.device)

    def alive(self) -> None:
        """Answers whatever it works at (``ray_kept``)."""


class ActorReward(MayGroup):
    """The reward of running actors, by their names: each call asks the next of them."""

    def __init__(self, name: str, actors: Sequence[str], task_info: Mapping[str, Any], timeout_s: float) -> None:
        """
        Raises:
            ConfigError: an actor cannot make its reward; it says why.
        """
        super().__init__()
        self.name, self.task_info = name, dict(task_info)
        self._actors, self._table = [Named(actor, timeout_s) for actor in actors], table_of(task_info)
        self._turns = itertools.count(os.getpid())  # processes begin with different ones
        try:
            self._groups: bool = self._greeted(self._next())["groups"]
        except (RayError, GetTimeoutError) as error:
            raise ConfigError(f"reward {name!r} does not start in its environment: {_said(error)}") from error

    @property
    def groups(self) -> bool:
        """As ``MayGroup.groups``."""
        return self._groups

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,), without gradient.

        Raises:
            RewardFailure: some samples cannot be scored.
            RewardRaised: because the user's own code raised there.
            RewardUnavailable: the actor is gone or late.
        """
        frame, actor = ask(samples.detach(), cond, self._table), self._next()
        try:
            found = actor.call("score", frame)
            if not found:  # it was started anew, or is asked for the first time
                self._greeted(actor)
                found = actor.call("score", frame)
        except (RayError, GetTimeoutError) as error:
            kind = RewardFailure if isinstance(error, RayTaskError) else RewardUnavailable
            raise kind.of_all(self.name, len(samples), f"its Ray actor failed: {_said(error)}") from error
        return answered(found, len(samples), frame).checked(self.name)

    def _next(self) -> Named:
        return self._actors[next(self._turns) % len(self._actors)]

    def _greeted(self, actor: Named) -> dict[str, Any]:
        told: dict[str, Any] = actor.call("hello", greet(self.task_info))
        return told


@contextmanager
def reward_actors(
    envs: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    cpus: int,
    gpus: int,
) -> Iterator[dict[str, list[str]]]:
    """Start the actors of each reward of ``envs`` (its runtime environment by its name), all as many: the actors' names
    by reward.

    The Ray cluster is that of ``settings``, or a private one of ``cpus`` and ``gpus``, which the rollout workers share.

    Raises:
        ConfigError: an environment cannot be made on this machine.
        RolloutError: no cluster can be had.
        DoesNotFit: it has no place for them.
    """
    for name, env in envs.items():
        if not settings.address:  # elsewhere is not ours to look at
            require_possible(name, env)
        require_servable(name, options.get(name) or {})
    each = settings.rewards.count // max(1, len(envs))
    with shared_cluster(settings, cpus, gpus):
        if settings.address and not in_actor():  # where a run is only checked nothing else has asked for their place
            require_place(nodes(), [settings.rewards])
        names: dict[str, list[str]] = {}
        starts: list[tuple[str, Callable[[], Any]]] = []
        for number, (name, env) in enumerate(envs.items()):
            names[name] = [f"rlfusion-reward-{os.getpid()}-{number}-{n}" for n in range(each)]
            make = partial(_started, name, dict(options.get(name) or {}), _uploaded(env), settings)
            starts += [(one, partial(make, one)) for one in names[name]]
        with kept(starts, settings.limits.item_floor_s / 2):
            yield names


def _started(reward: str, options: dict[str, Any], env: dict[str, Any], settings: Settings, name: str) -> Any:
    """A new actor of a reward."""
    role = settings.rewards
    reserved: Any = dict(
        max_restarts=RESTARTS, max_task_retries=RESTARTS, num_cpus=role.cpus, num_gpus=role.gpus,
        resources=dict(role.resources), concurrency_groups={BESIDE: 1},
    )  # fmt: skip
    paths = [os.path.abspath(path) for path in sys.path]
    made: Any = ray.remote(**reserved)(RewardActor).options(name=name, runtime_env=env)
    return made.remote(reward, options, paths, role.threads or settings.threads, role.gpus > 0, texts_of(reward))


def _uploaded(env: Mapping[str, Any]) -> dict[str, Any]:
    """A runtime environment whose folders of this machine are in the cluster: Ray itself does that for whole jobs."""
    with TemporaryDirectory(prefix="rlf-") as scratch:
        placed = upload_working_dir_if_needed(dict(env), include_gitignore=True, scratch_dir=scratch)
        return upload_py_modules_if_needed(placed, include_gitignore=True, scratch_dir=scratch)


def _said(error: Exception) -> str:
    """The error in a line; of Ray's own errors the last one too, where the reason is."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in f"{type(cause).__name__}: {cause}".splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1]))) if isinstance(cause, RayError) else lines[0]
