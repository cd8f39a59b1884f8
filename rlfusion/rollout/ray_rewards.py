"""Rewards in Ray actors, each with a runtime environment of its own: for dependencies that conflict with ours.

One actor a reward, for the workers and the driver alike. What crosses is the two frames of ``rewards.exchange``, by the
rules of the HTTP service: the values are those of the reward at home, bit for bit, and what cannot be scored is an
error of its item. An actor that dies is started anew by Ray, up to ``RESTARTS`` times, as scoring needs no memory.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
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
from rlfusion.rollout.ray_cluster import shared_cluster
from rlfusion.rollout.reward_envs import require_possible

RESTARTS = 3


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


class ActorReward(MayGroup):
    """The reward of a running actor, by the actor's name."""

    def __init__(self, name: str, actor: str, task_info: Mapping[str, Any], timeout_s: float) -> None:
        """
        Raises:
            ConfigError: the actor cannot make its reward; it says why.
        """
        super().__init__()
        self.name, self.task_info, self.timeout_s = name, dict(task_info), timeout_s
        self._actor, self._table = ray.get_actor(actor), table_of(task_info)
        try:
            self._groups: bool = self._greeted()["groups"]
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
        frame = ask(samples.detach(), cond, self._table)
        try:
            found = self._asked(frame)
            if not found:  # it was started anew
                self._greeted()
                found = self._asked(frame)
        except (RayError, GetTimeoutError) as error:
            kind = RewardFailure if isinstance(error, RayTaskError) else RewardUnavailable
            raise kind.of_all(self.name, len(samples), f"its Ray actor failed: {_said(error)}") from error
        return answered(found, len(samples), frame).checked(self.name)

    def _greeted(self) -> dict[str, Any]:
        told: Any = ray.get(self._actor.hello.remote(greet(self.task_info)), timeout=self.timeout_s)
        return told

    def _asked(self, frame: bytes) -> bytes:
        found: Any = ray.get(self._actor.score.remote(frame), timeout=self.timeout_s)
        return found


@contextmanager
def reward_actors(
    envs: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    cpus: int,
    gpus: int,
) -> Iterator[dict[str, str]]:
    """Start an actor for each reward of ``envs`` (its runtime environment by its name): the actors' names by reward.

    The Ray cluster is that of ``settings``, or a private one of ``cpus`` and ``gpus``, which the rollout workers share.

    Raises:
        ConfigError: an environment cannot be made on this machine.
        RolloutError: no cluster can be had.
    """
    if not settings.address:  # elsewhere is not ours to look at
        for name, env in envs.items():
            require_possible(name, env)
    with ExitStack() as stack:
        stack.enter_context(shared_cluster(settings, cpus, gpus))
        paths = [os.path.abspath(path) for path in sys.path]
        held: list[Any] = []
        names: dict[str, str] = {}
        for number, (name, env) in enumerate(envs.items()):
            require_servable(name, options.get(name) or {})
            names[name] = f"rlfusion-reward-{os.getpid()}-{number}"
            actor = ray.remote(RewardActor).options(
                name=names[name],
                runtime_env=_uploaded(env),
                num_cpus=settings.rewards.cpus,
                num_gpus=settings.rewards.gpus,
                resources=dict(settings.rewards.resources),
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
            given, gpu = dict(options.get(name) or {}), settings.rewards.gpus > 0
            held.append(actor.remote(name, given, paths, settings.threads, gpu, texts_of(name)))
        try:
            yield names
        finally:
            for actor in held:
                ray.kill(actor)


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
