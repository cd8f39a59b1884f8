"""How the settings of a fine-tuning become the task of a worker: from plain data and bytes alone, wherever it runs."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from rlfusion import lora, models
from rlfusion.chain import Chain
from rlfusion.config import Finetune
from rlfusion.measure import reward_parts
from rlfusion.policy import Policy
from rlfusion.rewards import Learned, Reward, WeightedSum, build, facts
from rlfusion.rollout import Needs, Recipe, Task
from rlfusion.weights import pack, unpack


def build_task(config: dict[str, Any], blobs: Mapping[str, bytes]) -> Task:
    """The task of one worker from plain data (see ``recipe``): the builder that rollout backends call."""
    torch.set_num_threads(config["threads"])
    card, chain = models.Card.from_json(config["card"]), Chain(**config["chain"])
    denoiser = models.build(card)
    denoiser.precision = config["precision"]
    lora.attach(denoiser.net, config["lora"])
    models.load_space(denoiser, blobs.get("space"))
    reward = build(config["reward"], config["reward_options"], facts(card.names, card.shape))
    if isinstance(reward, torch.nn.Module):
        reward.load_state_dict(unpack(blobs["reward"]))
        reward.to(config["device"])
    policy, needs = chain.policy(denoiser.to(config["device"]), card.names), Needs(**config["needs"])
    if "policy" in blobs:
        policy.load_state_dict(unpack(blobs["policy"]))
    return _task(card, chain, policy, reward, config["reward_name"], config["device"], needs, config["masked"])


def make_task(config: Finetune, card: models.Card, policy: Policy, reward: Reward) -> Task:
    """The learner's own task: its policy, with the chain and the reward of the workers."""
    device = str(next(policy.parameters()).device)
    needs = config.agent.needs(config.chain.moves)
    masked = config.reward_failures == "mask"
    return _task(card, config.chain, policy, reward, config.reward_name, device, needs, masked)


def _task(
    card: models.Card,
    chain: Chain,
    policy: Policy,
    reward: Reward,
    reward_name: str,
    device: str,
    needs: Needs,
    masked: bool,
) -> Task:
    return Task(
        policy=policy,
        grid=chain.grid,
        shape=policy.space.latent(card.shape),
        conditions=torch.arange(card.classes),
        decode=policy.space.decode,
        reward=reward,
        reward_name=reward_name,
        device=device,
        needs=needs,
        masked=masked,
    )


def recipe(config: Finetune, card: models.Card, policy: Policy, reward: Reward, device: torch.device) -> Recipe:
    """What every worker builds its task from. The learned parts of the reward, the decoder, and
    weights that are not trained travel as bytes."""
    described = {
        "card": asdict(card),
        "chain": asdict(config.chain),
        "reward": config.reward,
        "reward_options": worker_options(config, reward),
        "reward_name": config.reward_name,
        "device": device.type if config.rollout.workers else str(device),  # Ray shows a worker its own GPU as the only
        "threads": config.threads,
        "precision": config.precision,
        "lora": config.lora,
        "masked": config.reward_failures == "mask",
        "needs": asdict(config.agent.needs(config.chain.moves)),
    }
    blobs = {"reward": pack(reward_parts(reward)), **models.space_blob(policy.space)}
    if config.lora:  # else each version of the weights is all of them
        blobs["policy"] = pack(policy.state_dict())
    return Recipe("rlfusion.tasks:build_task", described, blobs)


def worker_options(config: Finetune, reward: Reward) -> dict[str, dict[str, Any]]:
    """The options with which a worker builds ``reward``, whose learned parts arrive as bytes."""
    parts = reward.rewards if isinstance(reward, WeightedSum) else {config.reward: reward}
    blank = {name: part.blank() for name, part in parts.items() if isinstance(part, Learned)}
    return config.reward_options | {
        name: (config.reward_options.get(name) or {}) | made for name, made in blank.items()
    }
