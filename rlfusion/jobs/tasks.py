"""Builds the task of a worker from the settings of a fine-tuning: from plain data and bytes alone, wherever it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlfusion import models
from rlfusion.common import shards
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import pack, unpack
from rlfusion.config import Finetune
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.jobs.measure import reward_parts
from rlfusion.jobs.parts import RewardSpec, TaskSpec, Workers
from rlfusion.jobs.roles import roles
from rlfusion.rewards import CallOptions, Learned, Reward, WeightedSum, bare, build, everywhere, task_info
from rlfusion.rollout import Local, Recipe, RolloutSpec, Task
from rlfusion.rollout.placement import private
from rlfusion.training.devices import set_numerics


def build_task(config: dict[str, Any], blobs: Mapping[str, bytes]) -> Task:
    """The task of one worker from plain data (see ``recipe``): the builder that rollout backends call."""
    set_numerics(config["threads"], config["device"], config["deterministic"], config["tf32"])
    card, chain = models.Card.from_json(config["card"]), Chain(**config["chain"])
    denoiser = _based(config["base"]) if "base" in config else models.build(card, device=config["device"])
    models.adapt(denoiser, card, config["lora"])
    models.Arithmetic(**config["arithmetic"]).act(denoiser, card)
    models.load_space(denoiser, blobs.get("space"))
    known = task_info(card.names, card.shape, card.metadata)
    made = from_actors(config["actors"], known, config["actor_s"])
    reward = build(config["reward"], config["reward_options"], known, CallOptions(**config["call_options"]), made)
    if isinstance(reward, torch.nn.Module):
        reward.load_state_dict(unpack(blobs["reward"]))
        reward.to(config["device"])
    policy, spec = chain.policy(denoiser.to(config["device"]), card.names), RolloutSpec(**config["rollout_spec"])
    if "policy" in blobs:
        policy.load_state_dict(unpack(blobs["policy"]))
    return _task(_Walks(chain, spec, config["reward_name"], config["masked"]), card, policy, reward, config["device"])


def _based(base: dict[str, str]) -> Denoiser:
    """The base model of a network that is split over ranks, which has no process that could send it.

    Raises:
        ConfigError: it is not there, or another one.
    """
    path = Path(base["path"])
    if models.digest(path) != base["sha256"]:
        raise ConfigError(f"base {str(path)!r} is another model here than where the ranks learn")
    return models.load(path)[0]


def make_task(spec: TaskSpec, card: models.Card, policy: Policy, reward: Reward) -> Task:
    """The learner's own task: its policy, with the chain and the reward of the workers."""
    walks = _Walks(spec.chain, spec.rollout, spec.rewards.name, spec.rewards.masked)
    return _task(walks, card, policy, reward, str(next(policy.parameters()).device))


def acting_here(spec: TaskSpec, card: models.Card, policy: Policy, reward: Reward, overlap: bool = False) -> Local:
    """Walks in this process, by a copy of the policy; by the policy itself where the graph of its steps is kept. With
    ``overlap`` items are scored while others are walked.
    """
    own = policy if spec.rollout.trained is not None else frozen_copy(policy)
    return Local(make_task(spec, card, own, reward), overlap)


class _Walks(NamedTuple):
    """What a worker and the learner have in common."""

    chain: Chain
    rollout: RolloutSpec
    reward_name: str
    masked: bool


def _task(walks: _Walks, card: models.Card, policy: Policy, reward: Reward, device: str) -> Task:
    return Task(
        policy=policy,
        grid=walks.chain.grid(policy.denoiser),
        shape=policy.space.latent(card.shape),
        conditions=torch.arange(card.classes),
        decode=policy.space.decode,
        reward=reward,
        reward_name=walks.reward_name,
        device=device,
        rollout_spec=walks.rollout,
        masked=walks.masked,
    )


def recipe(
    spec: TaskSpec,
    workers: Workers,
    card: models.Card,
    policy: Policy,
    reward: Reward,
    device: torch.device,
    actors: Mapping[str, Sequence[str]] | None = None,
) -> Recipe:
    """The recipe from which every worker builds its task. The learned parts of the reward, the decoder, and
    weights that are not trained travel as bytes."""
    described = {
        "card": card.to_json(),
        "chain": asdict(spec.chain),
        "reward": _everywhere(spec.rewards.reward),
        "reward_options": {everywhere(name): held for name, held in worker_options(spec.rewards, reward).items()},
        "call_options": asdict(spec.rewards.call_options),
        "actors": {everywhere(name): list(held) for name, held in (actors or {}).items()},
        "actor_s": workers.ray.limits.item_s,
        "reward_name": spec.rewards.name,
        "device": workers.backend.worker_device(str(device)),
        "threads": workers.backend.threads,
        "deterministic": spec.deterministic,
        "tf32": spec.tf32,
        "arithmetic": asdict(spec.arithmetic),
        "lora": spec.lora,
        "masked": spec.rewards.masked,
        "rollout_spec": asdict(spec.rollout),
    }
    blobs = {"reward": pack(reward_parts(reward)), **models.space_blob(policy.space)}
    if spec.lora and not card.pipeline and not shards.roots(policy):
        # else a pipeline has them in its files, as the base of a split network; or each version is all of them
        blobs["policy"] = pack(policy.state_dict())
    return Recipe("rlfusion.jobs.tasks:build_task", described, blobs)


def worker_options(rewards: RewardSpec, reward: Reward) -> dict[str, dict[str, Any]]:
    """The options with which a worker builds ``reward``, whose learned parts arrive as bytes."""
    parts = reward.rewards if isinstance(reward, WeightedSum) else {rewards.reward: reward}
    bared = {name: bare(part) for name, part in parts.items()}
    blank = {name: part.blank() for name, part in bared.items() if isinstance(part, Learned)}
    given = rewards.options
    return given | {name: (given.get(name) or {}) | made for name, made in blank.items()}


def _everywhere(reward: str | Mapping[str, float]) -> str | dict[str, float]:
    """A reward's setting for a process with another working directory."""
    return everywhere(reward) if isinstance(reward, str) else {everywhere(n): w for n, w in reward.items()}


@contextmanager
def actors_of(workers: Workers, options: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, list[str]]]:
    """The running actors of ``ray.reward_envs``, with the options of each reward: their names by reward; none, and no
    Ray, where there are no such.

    Raises:
        ConfigError: one cannot be started.
    """
    ray = workers.ray
    if not ray.reward_envs:
        yield {}
        return
    from rlfusion.rollout.ray_rewards import reward_actors

    envs = {everywhere(name): env for name, env in ray.reward_envs.items()}
    held = {everywhere(name): dict(given) for name, given in options.items()}
    with reward_actors(envs, held, workers.backend, *private(workers.backend.roles)) as names:
        yield {name: names[everywhere(name)] for name in ray.reward_envs}


@contextmanager
def cluster_of(config: Finetune, say: Callable[[str], None]) -> Iterator[None]:
    """The Ray cluster that the workers and actors of a fine-tuning use, had before any work, with a place for all of
    them, which ``say`` is told of; none, and no Ray, where there are no workers.

    Raises:
        RolloutError: it cannot be had.
        DoesNotFit: it has no place for all.
    """
    if not config.rollout.workers:
        yield
        return
    from rlfusion.rollout.ray_cluster import shared_cluster
    from rlfusion.rollout.ray_placement import in_actor, placed

    with shared_cluster(config.settings, *private(config.settings.roles)):
        if not in_actor():  # else they were placed together with the ranks
            placed(config.settings, *roles(config), say)
        yield


def from_actors(actors: Mapping[str, Sequence[str]], known: Mapping[str, Any], timeout_s: float) -> dict[str, Reward]:
    """The rewards of running actors, for a model of this task info.

    Raises:
        ConfigError: an actor cannot make its reward.
    """
    if not actors:
        return {}
    from rlfusion.rollout.ray_rewards import ActorReward

    return {name: ActorReward(name, held, known, timeout_s) for name, held in actors.items()}
