"""The job of ``rlfusion sample``: a picture of a model's samples."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion import config, models
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy
from rlfusion.jobs.measure import draw
from rlfusion.training.devices import pick_device, set_numerics
from rlfusion.training.tracking import grid, save_png

COLUMNS = 10


class Sampler(NamedTuple):
    """A model with the chain that samples it."""

    denoiser: Denoiser
    card: models.Card
    policy: Policy
    times: Tensor


def sampler(settings: config.Sample | config.Evaluate, most: int, label: str = "") -> Sampler:
    """The model of a command on its device, with its chain; of a pipeline with the first ``most`` of its prompts, or
    with the one that is ``label``, as no others are asked for.
    """
    chain, device = settings.chain, pick_device(settings.device)
    card = models.describe(settings.checkpoint, settings.pipeline, chain.negative)
    card = card.only(label) if label in card.names else card.first(most or card.classes)
    if card.pipeline:
        denoiser = models.build(card, device=device)
    else:
        denoiser, card = models.load(Path(settings.checkpoint))
    denoiser = denoiser.to(device)
    return Sampler(denoiser, card, chain.policy(denoiser, card.names), chain.times(denoiser))


def sample(settings: config.Sample) -> None:
    """Draw samples and write the picture."""
    set_numerics(settings.threads, pick_device(settings.device))
    denoiser, card, policy, times = sampler(settings, settings.count, settings.label)
    if settings.label and settings.label not in card.names and not card.captioned:
        raise ConfigError(f"label = {settings.label!r}: expected one of {', '.join(card.names)}")
    if settings.label not in ("", *card.names):
        card = replace(card, names=(*card.names, settings.label))
        denoiser.net.label.set(card.names)
        policy = settings.chain.policy(denoiser, card.names)
    device = next(denoiser.parameters()).device
    label = torch.arange(settings.count, device=device) % card.classes
    if settings.label:
        label = torch.full_like(label, card.names.index(settings.label))
    samples = draw(policy, times, label, card.shape, settings.seed, "sample")
    columns = card.classes if 1 < card.classes <= 2 * COLUMNS and not settings.label else COLUMNS
    save_png(Path(settings.out), grid(samples, min(columns, settings.count), settings.scale))
