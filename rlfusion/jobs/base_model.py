"""Where a fine-tuning begins: its base model, what samples are held against, and the data the base was trained on.

A base model is one trained here (from the cache, or trained now), the folder of a run, or a pretrained pipeline. Of a
pipeline no data are known: there is no judge, and what needs data is refused.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.hollow import Filling
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.data import Dataset, load
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.jobs.measure import Judged, Unjudged, require_models_data
from rlfusion.jobs.parts import BaseSpec
from rlfusion.jobs.pretrain import base_model, seen_data
from rlfusion.models import pipelines
from rlfusion.models.autoencoder import encoded

NONE: Filling = {}


class Origin(NamedTuple):
    """The beginning of a fine-tuning; ``data`` is None where none are known. Parameters that the denoiser has no memory
    for are read by ``filling``. ``folder`` is that of a model that is no pipeline.
    """

    denoiser: Denoiser
    card: models.Card
    judged: Judged | Unjudged
    data: Dataset | None
    filling: Filling = NONE
    folder: Path | None = None


def pretrained(spec: BaseSpec) -> models.Card | None:
    """The card of the pretrained pipeline that ``base`` names; None where it is another model.

    Raises:
        ConfigError: settings of a pipeline for another model, or a pipeline that cannot be used with its settings.
    """
    cache = spec.root / "cache"
    card = models.describe(spec.name, spec.pipeline, spec.negative, cache) if spec.name else None
    if card is not None and card.pipeline:
        return card
    if spec.pipeline != pipelines.Settings():
        raise ConfigError(f"pipeline.* is given, and base = {spec.name!r} is no pretrained pipeline: expected none")
    return None


def begin(spec: BaseSpec, device: torch.device, signals: Signals, progress: Progress, split: bool = False) -> Origin:
    """The base model with its adapters on ``device``, and what belongs to it. One that is to be ``split`` over ranks is
    on the CPU, without memory for what they will read.

    Raises:
        ConfigError: settings that cannot work together.
    """
    card, filling, base = pretrained(spec), NONE, None
    if card is not None:
        if split:
            denoiser, _, filling = models.build_hollow(card, device)
        else:
            denoiser = models.build(card, device=device)
        judged: Judged | Unjudged = Unjudged(card.shape, card.names, card.metadata)
        data = None
    else:
        base = Path(spec.name) if spec.name else base_model(spec.pretrain, spec.root, device, signals, progress)
        if split:
            denoiser, card, filling = models.load_hollow(base)
        else:
            denoiser, card = models.load(base)
        held = load(spec.pretrain.data, spec.pretrain.size, progress.say)
        require_models_data(spec.pretrain.data, held, card, spec.pretrain.held_out)
        judged = Judged.of(held, spec.pretrain.held_out, spec.root, device)
        data = encoded(seen_data(spec.name, spec.pretrain, judged.train), denoiser.space)
    models.adapt(denoiser, card, spec.lora, spec.seed)
    spec.arithmetic.act(denoiser, card)
    return Origin(denoiser if split else denoiser.to(device), card, judged, data, filling, base)
