"""What a fine-tuning refuses before any work."""

from dataclasses import replace
from pathlib import Path

import torch

from rlfusion import models
from rlfusion.common import hollow
from rlfusion.common.errors import ConfigError
from rlfusion.common.replayed import require_graphs
from rlfusion.common.seeding import normal
from rlfusion.common.tensors import to_pixels
from rlfusion.config import Finetune
from rlfusion.data import load
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy, require_stochastic
from rlfusion.evaluation import require_bound
from rlfusion.jobs import base_model
from rlfusion.jobs.finetune.anew import kept
from rlfusion.jobs.groups import require_whole_groups
from rlfusion.jobs.measure import Unjudged, require_judgeable
from rlfusion.jobs.outside import Opened, outline_of
from rlfusion.jobs.parts import opened
from rlfusion.jobs.pretrain import card_of, require_no_class, require_same_data, require_solvable
from rlfusion.jobs.tasks import actors_of, from_actors, make_task
from rlfusion.models import lora, pipelines
from rlfusion.models.autoencoder import encoded
from rlfusion.rewards import build, score, task_info
from rlfusion.rewards.untrained import require_weights
from rlfusion.rl.agent import learner_of
from rlfusion.rl.critic import COPY
from rlfusion.rollout.ray_address import require_cluster
from rlfusion.training.devices import pick_device, require_device
from rlfusion.training.trackers import require_usable

TRIED, PIPELINE_TRIED = 4, 2
"""Samples on which the reward is tried."""
JUDGED = ("agreement", "frechet_base")
"""What the monitor can only say with a judge."""


def _require_device(config: Finetune) -> None:
    """Raise ConfigError for a device that is not here, or that cannot call the network as the settings say."""
    if config.compile == "graphs":
        _require_gpus(config)
    if config.learner.ranks:
        require_device(config.device)  # a head needs none of its own
        return
    device = pick_device(config.device)
    if config.compile == "graphs":
        require_graphs(device)


def _require_gpus(config: Finetune) -> None:
    """Raise ConfigError where processes that call the network by CUDA graphs have no GPU."""
    learner, workers = config.learner, config.rollout.workers
    lacking = {"ray.gpus_per_worker": workers and not config.ray.gpus_per_worker}
    lacking |= {"learner.gpus_per_rank": learner.ranks and not learner.gpus_per_rank}
    for name in (name for name, lacks in lacking.items() if lacks):
        raise ConfigError(
            f"compile = graphs with {name} = 0: only a GPU has CUDA graphs, expected a GPU or a share of one for each, "
            "or compile true or false"
        )
    if learner.ranks and config.device.startswith("cpu"):
        require_graphs(torch.device("cpu"))


def check(config: Finetune) -> None:
    """Refuse what cannot work, before any work: device, Ray cluster, base model, data, chain, learner, reward.

    Raises:
        ConfigError: says which setting and why.
        RolloutError: no Ray cluster answers at its address.
    """
    _require_device(config)
    kept(config.agent)
    require_usable(config.track)
    if config.rollout.workers or config.learner.ranks:
        require_cluster(config.ray.address, config.ray.connect_timeout_s)
    parts = opened(config)
    card = base_model.pretrained(parts.base)
    if card is not None:
        check_pretrained(config, card)
        return
    data = load(config.pretrain.data, config.pretrain.size)
    require_judgeable(data, config.pretrain.held_out)
    made = card_of(config.pretrain, data)
    card = models.load_card(Path(config.base)) if config.base else made
    require_same_data(f"base = {config.base!r}", card, made, config.pretrain.data)
    denoiser = _outline(config, card)
    models.adapt(denoiser, card, config.lora)
    require_solvable(denoiser, config.chain)
    if not config.base:
        require_no_class(config.pretrain, config.chain)
    policy = config.chain.policy(denoiser, card.names)
    if config.evaluation.bits_per_dim:
        require_bound(policy, config.chain.times(denoiser), data)
    known = task_info(card.names, card.shape, card.metadata)
    for name in config.monitor.held_out:
        require_weights(parts.rewards.options_of(name))
        build(name, parts.rewards.options_of(name), known)
    with actors_of(parts.workers, parts.rewards.given) as actors:
        made = from_actors(actors, known, config.ray.limits.item_s)
        require_weights(parts.rewards.options)
        reward = build(config.reward, parts.rewards.options, known, config.call_options, made)
        require_whole_groups(config.rollout, parts.task, config.agent.name, card.classes, reward)
        task = replace(make_task(parts.task, card, policy, reward), device="cpu")  # without weights it would be meta
        task = replace(task, outside=Opened(parts.base, config.chain, card, policy))
        learner_of(config.agent, task, encoded(data, denoiser.space), config.seed)
        label = data.label[: TRIED // 2].repeat_interleave(2)  # two of a prompt, for rewards that compare
        score(reward, to_pixels(data.x[:TRIED]), label, parts.rewards.name, parts.rewards.masked)


def _outline(config: Finetune, card: models.Card) -> Denoiser:
    """The base model, for what looks at its form. Of one that will be split, the driver has no weights."""
    if config.learner.split:
        if config.base:
            return models.load_hollow(Path(config.base)).denoiser
        return models.build(card, within=hollow.parameters())
    return models.load(Path(config.base))[0] if config.base else models.build(card)


def require_reward(config: Finetune) -> None:
    """Refuse a reward that cannot be made, whatever learns from it.

    Raises:
        ConfigError: says what of it.
    """
    parts = opened(config)
    card = base_model.pretrained(parts.base)
    if card is not None:
        judged = Unjudged(card.shape, card.names, card.metadata)
        judged.reward(config.reward, parts.rewards.options, parts.base.root)
        return
    data = load(config.pretrain.data, config.pretrain.size)
    card = models.load_card(Path(config.base)) if config.base else card_of(config.pretrain, data)
    build(config.reward, parts.rewards.options, task_info(card.names, card.shape, card.metadata))


def check_pretrained(config: Finetune, card: models.Card) -> None:
    """Refuse what cannot work with a pretrained pipeline, before its weights are read.

    Raises:
        ConfigError: says which setting and why.
    """
    parts = opened(config)
    _require_noise(config, card)
    adapters = lora.parse(config.lora)
    if adapters is None:
        models.require_trainable(card)
    if config.learner.split:
        pipelines.require_whole(card.pipeline)
    if card.pipeline.get("quantize") and parts.holds.critic == COPY:
        raise ConfigError(f"critic = {COPY!r}: it copies weights that are rounded, expected pipeline.quantize none")
    if config.evaluation.bits_per_dim:
        raise ConfigError("evaluation.bits_per_dim = True: there are no held-out data of a pipeline, expected False")
    if config.monitor.best in JUDGED or config.monitor.frechet_base is not None:
        raise ConfigError(
            f"monitor.best, monitor.frechet_base = {config.monitor.best}, {config.monitor.frechet_base}: there is no "
            "judge without data, expected another best and null"
        )
    config.agent.check_stored(lambda data: outline_of(data, card))
    judged = Unjudged(card.shape, card.names, card.metadata)
    for name in config.monitor.held_out:
        judged.reward(name, parts.rewards.options_of(name), parts.base.root)
    samples = to_pixels(normal(("check",), range(PIPELINE_TRIED), card.shape))
    with actors_of(parts.workers, parts.rewards.given) as actors:
        made = from_actors(actors, task_info(card.names, card.shape, card.metadata), config.ray.limits.item_s)
        reward = judged.reward(config.reward, parts.rewards.options, parts.base.root, config.call_options, made)
        require_whole_groups(config.rollout, parts.task, config.agent.name, card.classes, reward)
        label = torch.zeros(PIPELINE_TRIED, dtype=torch.int64)  # of one prompt, for rewards that compare
        score(reward, samples, label, parts.rewards.name, parts.rewards.masked)


def _require_noise(config: Finetune, card: models.Card) -> None:
    """Refuse a chain without noise for an agent that takes log-probabilities of its steps.

    Raises:
        ConfigError: there is none; or a kernel or a grid that cannot be.
    """
    outline = pipelines.outline(card.pipeline)
    policy, times = Policy(outline, config.chain.make_kernel()), config.chain.times(outline)
    if config.agent.rollout_spec(config.chain.moves).path and not config.agent.traits().noiseless:
        require_stochastic(policy, times)
