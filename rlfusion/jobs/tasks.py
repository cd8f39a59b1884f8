"""How the settings of a fine-tuning become the task of a worker: from plain data and bytes alone, wherever it runs."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import pack, unpack
from rlfusion.config import Finetune
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.policy import Policy
from rlfusion.jobs.measure import reward_parts
from rlfusion.rewards import (
    CallOptions,
    Learned,
    Reward,
    WeightedSum,
    bare,
    build,
    everywhere,
    names_of,
    needs_groups,
    task_info,
)
from rlfusion.rollout import Recipe, RolloutSpec, Task


def build_task(config: dict[str, Any], blobs: Mapping[str, bytes]) -> Task:
    """The task of one worker from plain data (see ``recipe``): the builder that rollout backends call."""
    torch.set_num_threads(config["threads"])
    card, chain = models.Card.from_json(config["card"]), Chain(**config["chain"])
    denoiser = models.build(card)
    denoiser.precision = config["precision"]
    models.adapt(denoiser, card, config["lora"])
    models.load_space(denoiser, blobs.get("space"))
    known = task_info(card.names, card.shape, card.metadata)
    made = from_actors(config["actors"], known, config["actor_s"])
    reward = build(config["reward"], config["reward_options"], known, CallOptions(**config["call_options"]), made)
    if isinstance(reward, torch.nn.Module):
        reward.load_state_dict(unpack(blobs["reward"]))
        reward.to(config["device"])
    policy = chain.policy(denoiser.to(config["device"]), card.names)
    rollout_spec = RolloutSpec(**config["rollout_spec"])
    if "policy" in blobs:
        policy.load_state_dict(unpack(blobs["policy"]))
    return _task(card, chain, policy, reward, config["reward_name"], config["device"], rollout_spec, config["masked"])


def make_task(config: Finetune, card: models.Card, policy: Policy, reward: Reward) -> Task:
    """The learner's own task: its policy, with the chain and the reward of the workers."""
    device = str(next(policy.parameters()).device)
    rollout_spec = config.agent.rollout_spec(config.chain.moves)
    masked = config.reward_failures == "mask"
    return _task(card, config.chain, policy, reward, config.reward_name, device, rollout_spec, masked)


def _task(
    card: models.Card,
    chain: Chain,
    policy: Policy,
    reward: Reward,
    reward_name: str,
    device: str,
    rollout_spec: RolloutSpec,
    masked: bool,
) -> Task:
    return Task(
        policy=policy,
        grid=chain.grid(policy.denoiser),
        shape=policy.space.latent(card.shape),
        conditions=torch.arange(card.classes),
        decode=policy.space.decode,
        reward=reward,
        reward_name=reward_name,
        device=device,
        rollout_spec=rollout_spec,
        masked=masked,
    )


def recipe(
    config: Finetune,
    card: models.Card,
    policy: Policy,
    reward: Reward,
    device: torch.device,
    actors: Mapping[str, str] | None = None,
) -> Recipe:
    """What every worker builds its task from. The learned parts of the reward, the decoder, and
    weights that are not trained travel as bytes."""
    described = {
        "card": card.to_json(),
        "chain": asdict(config.chain),
        "reward": _everywhere(config.reward),
        "reward_options": {everywhere(name): held for name, held in worker_options(config, reward).items()},
        "call_options": asdict(config.call_options),
        "actors": {everywhere(name): actor for name, actor in (actors or {}).items()},
        "actor_s": config.ray.limits.item_s,
        "reward_name": config.reward_name,
        "device": device.type if config.rollout.workers else str(device),  # Ray shows a worker its own GPU as the only
        "threads": config.threads,
        "precision": config.precision,
        "lora": config.lora,
        "masked": config.reward_failures == "mask",
        "rollout_spec": asdict(config.agent.rollout_spec(config.chain.moves)),
    }
    blobs = {"reward": pack(reward_parts(reward)), **models.space_blob(policy.space)}
    if (
        config.lora and not card.pipeline
    ):  # a pipeline has them in its files; else each version of the weights is all of them
        blobs["policy"] = pack(policy.state_dict())
    return Recipe("rlfusion.jobs.tasks:build_task", described, blobs)


def worker_options(config: Finetune, reward: Reward) -> dict[str, dict[str, Any]]:
    """The options with which a worker builds ``reward``, whose learned parts arrive as bytes."""
    parts = reward.rewards if isinstance(reward, WeightedSum) else {config.reward: reward}
    bared = {name: bare(part) for name, part in parts.items()}
    blank = {name: part.blank() for name, part in bared.items() if isinstance(part, Learned)}
    given = config.options_of(*names_of(config.reward))
    return given | {name: (given.get(name) or {}) | made for name, made in blank.items()}


def _everywhere(reward: str | Mapping[str, float]) -> str | dict[str, float]:
    """A reward's setting for a process with another working directory."""
    return everywhere(reward) if isinstance(reward, str) else {everywhere(n): w for n, w in reward.items()}


@contextmanager
def actors_of(config: Finetune) -> Iterator[dict[str, str]]:
    """The running actors of ``ray.reward_envs``: their names by reward; none, and no Ray, where there are no such.

    Raises:
        ConfigError: one cannot be started.
    """
    ray = config.ray
    if not ray.reward_envs:
        yield {}
        return
    from rlfusion.rollout.ray_rewards import reward_actors

    envs = {everywhere(name): env for name, env in ray.reward_envs.items()}
    options = {everywhere(name): held for name, held in config.reward_options.items()}
    with reward_actors(envs, options, config.settings, *_reserved(config), ray.gpus_per_reward) as names:
        yield {name: names[everywhere(name)] for name in ray.reward_envs}


@contextmanager
def cluster_of(config: Finetune) -> Iterator[None]:
    """The Ray cluster that workers and actors use, had before any work; none, and no Ray, where there are no workers.

    Raises:
        RolloutError: it cannot be had.
    """
    if not config.rollout.workers:
        yield
        return
    from rlfusion.rollout.ray_cluster import shared_cluster

    with shared_cluster(config.settings, *_reserved(config)):
        yield


def _reserved(config: Finetune) -> tuple[int, int]:
    """The CPU cores and GPUs of all workers and reward actors."""
    ray, workers = config.ray, config.rollout.workers
    gpus = workers * ray.gpus_per_worker + len(ray.reward_envs) * ray.gpus_per_reward
    return max(1, math.ceil(workers * ray.cpus_per_worker)), math.ceil(gpus)


def from_actors(actors: Mapping[str, str], known: Mapping[str, Any], timeout_s: float) -> dict[str, Reward]:
    """The rewards of running actors, for a model of this task info.

    Raises:
        ConfigError: an actor cannot make its reward.
    """
    if not actors:
        return {}
    from rlfusion.rollout.ray_rewards import ActorReward

    return {name: ActorReward(name, actor, known, timeout_s) for name, actor in actors.items()}


def require_whole_groups(config: Finetune, prompts: int, reward: Reward) -> None:
    """Refuse more prompts in a rollout than there are (of one condition alone a rollout may have any number of groups),
    and rollouts that would tear the groups of a reward that compares the samples of a prompt.

    Raises:
        ConfigError: so many prompts; or the agent scores sample by sample, a prompt has one sample, an item holds part
            of a prompt's samples, or a prompt comes twice in a rollout.
    """
    r = config.rollout
    if r.prompts > prompts > 1:
        raise ConfigError(f"rollout.prompts = {r.prompts}: expected at most the {prompts} prompts that there are")
    if not needs_groups(reward):
        return
    what = f"reward {config.reward_name!r} compares the samples of a prompt"
    if not config.agent.rollout_spec(config.chain.moves).end:
        raise ConfigError(f"agent = {config.agent.name}: it scores as it learns, sample by sample, and {what}")
    if r.samples_per_prompt < 2:
        raise ConfigError(f"samples_per_prompt = {r.samples_per_prompt}: {what}, expected 2 at least")
    if r.item % r.samples_per_prompt:
        near = max(1, round(r.item / r.samples_per_prompt)) * r.samples_per_prompt
        raise ConfigError(
            f"rollout.item = {r.item}: {what}, expected a multiple of samples_per_prompt = "
            f"{r.samples_per_prompt}, such as {near}"
        )
    if r.prompts > prompts:
        raise ConfigError(f"rollout.prompts = {r.prompts}: {what}, expected at most the {prompts} that there are")
