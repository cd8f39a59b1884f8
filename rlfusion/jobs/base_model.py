"""Where a fine-tuning begins: its base model, what samples are held against, and the data the base was trained on.

A base model is one trained here (from the cache, or trained now), the folder of a run, or a pretrained pipeline. Of a
pipeline no data are known: there is no judge, and what needs data is refused.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.seeding import normal
from rlfusion.common.stops import Signals
from rlfusion.common.tensors import to_pixels
from rlfusion.config import Finetune
from rlfusion.data import Dataset, load
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.jobs.measure import Judged, Unjudged
from rlfusion.jobs.pretrain import base_model, seen
from rlfusion.jobs.tasks import actors_of, from_actors, require_whole_groups
from rlfusion.models import lora, pipelines
from rlfusion.models.autoencoder import encoded
from rlfusion.rewards import find, names_of, score, task_info

TRIED = 2
JUDGED = ("agreement", "frechet_base")
"""What the monitor can only say with a judge."""


class Origin(NamedTuple):
    """The beginning of a fine-tuning; ``data`` is None where none are known."""

    denoiser: Denoiser
    card: models.Card
    judged: Judged | Unjudged
    data: Dataset | None


def pretrained(config: Finetune) -> models.Card | None:
    """The card of the pretrained pipeline that ``base`` names; None where it is another model.

    Raises:
        ConfigError: settings of a pipeline for another model, or a pipeline that cannot be used with its settings.
    """
    cache = Path(config.root) / "cache"
    card = models.describe(config.base, config.pipeline, config.chain.negative, cache) if config.base else None
    if card is not None and card.pipeline:
        return card
    if config.pipeline != pipelines.Settings():
        raise ConfigError(f"pipeline.* is given, and base = {config.base!r} is no pretrained pipeline: expected none")
    return None


def begin(config: Finetune, root: Path, device: torch.device, signals: Signals, progress: Progress) -> Origin:
    """The base model on ``device``, with its adapters, and what belongs to it.

    Raises:
        ConfigError: settings that cannot work together.
    """
    card = pretrained(config)
    if card is not None:
        denoiser = models.build(card, device=device)
        judged: Judged | Unjudged = Unjudged(card.shape, card.names, card.metadata)
        data = None
    else:
        base = Path(config.base) if config.base else base_model(config.pretrain, root, device, signals, progress)
        denoiser, card = models.load(base)
        held = load(config.pretrain.data, config.pretrain.size, progress.say)
        judged = Judged.of(held, config.pretrain.held_out, root, device)
        data = encoded(seen(config.base, config.pretrain, judged.train), denoiser.space)
    denoiser.precision = config.precision
    models.adapt(denoiser, card, config.lora, config.seed)
    return Origin(denoiser.to(device), card, judged, data)


def check_pretrained(config: Finetune, card: models.Card) -> None:
    """Refuse what cannot work with a pretrained pipeline, before its weights are read.

    Raises:
        ConfigError: says which setting and why.
    """
    config.chain.make_kernel()
    adapters = lora.parse(config.lora)
    if adapters is None:
        models.require_trainable(card)
    if config.evaluation.bits_per_dim:
        raise ConfigError("evaluation.bits_per_dim = True: there are no held-out data of a pipeline, expected False")
    if config.monitor.best in JUDGED or config.monitor.frechet_base is not None:
        raise ConfigError(
            f"monitor.best, monitor.frechet_base = {config.monitor.best}, {config.monitor.frechet_base}: there is no "
            "judge without data, expected another best and null"
        )
    judged = Unjudged(card.shape, card.names, card.metadata)
    options = config.options_of(*names_of(config.reward))
    for name in config.monitor.held_out:
        find(name)
    samples = to_pixels(normal(("check",), range(TRIED), card.shape))
    with actors_of(config) as actors:
        made = from_actors(actors, task_info(card.names, card.shape, card.metadata), config.ray.limits.item_s)
        reward = judged.reward(config.reward, options, Path(config.root), config.call_options, made)
        require_whole_groups(config, card.classes, reward)
        label = torch.zeros(TRIED, dtype=torch.int64)  # of one prompt, for rewards that compare
        score(reward, samples, label, config.reward_name, config.reward_failures == "mask")
