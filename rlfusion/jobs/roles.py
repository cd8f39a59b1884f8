"""The processes of a run, and the memory that each takes at least: from the descriptions and files of its model alone,
before anything is loaded.

    learner    Eq. (1), (2) and (5) of ``jobs.memory``, of adapters and of a new critic nothing; and the autoencoder
    worker     the network and the autoencoder
    reward     what it is made of is not known before it is made

Activations are not in it, nor what libraries take: it is what certainly does not fit that is refused.
"""

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from rlfusion import models
from rlfusion.common import on_disk
from rlfusion.config import Finetune
from rlfusion.data import load
from rlfusion.jobs import base_model, memory
from rlfusion.jobs.parts import Parts, opened
from rlfusion.jobs.pretrain import card_of
from rlfusion.models import pipelines
from rlfusion.rl.critic import COPY
from rlfusion.rollout.placement import PROCESS, Role
from rlfusion.rollout.placement_table import Driver
from rlfusion.training import optimizers
from rlfusion.training.devices import memory_of, pick_device

PART = re.compile(r"-\d+-of-\d+")
TRIED = 2**14
"""Elements of the tensor by which the bytes of an optimiser's moments are found."""


class Facts(NamedTuple):
    """Bytes of a model's network, frozen and trained (adapters are not counted), and of its autoencoder."""

    frozen: int
    trained: int
    space: int


class Least(NamedTuple):
    """Bytes that a process that learns takes at least, and one that collects; 0 where nothing is known."""

    learner: int = 0
    worker: int = 0


def roles(config: Any) -> tuple[tuple[Role, ...], Driver]:
    """The processes of a run that a cluster shall have a place for, and this one. ``config`` is any command's that has
    ``learner`` and ``settings``; of a fine-tuning alone the memory is known.

    Raises:
        ConfigError: a model that is not there, or cannot be understood.
    """
    least = of_finetuning(opened(config)) if isinstance(config, Finetune) else Least()
    held = config.learner
    ranks = replace(held.role(config.threads), memory=least.learner)
    workers, rewards = config.settings.roles
    placed = (ranks, replace(workers, memory=least.worker), rewards)
    if held.ranks:
        return placed, Driver("cpu", config.threads, PROCESS, memory_of("cpu"))
    device = str(pick_device(config.device))
    own = least.learner + (PROCESS if device == "cpu" and least.learner else 0)
    return placed, Driver(device, config.threads, own, memory_of(device))


def of_finetuning(parts: Parts) -> Least:
    """Of the parts of a fine-tuning.

    Raises:
        ConfigError: as ``roles``.
    """
    found, holds = facts(parts), parts.holds
    if not found.frozen + found.trained:
        return Least()
    one = torch.nn.Parameter(torch.zeros(TRIED))
    moments = optimizers.state_bytes(optimizers.parse(holds.optimizer), [one]) / (TRIED * 4)
    copied = found.frozen + found.trained if holds.critic == COPY else 0
    critic = memory.CriticBytes(copied, math.floor(moments * copied))
    held = memory.of_weights(
        holds._replace(watched=False), found.frozen, found.trained, math.floor(moments * found.trained), critic
    )
    return Least(sum(held.values()) + found.space, found.frozen + found.trained + found.space)


def facts(parts: Parts) -> Facts:
    """The bytes of the model that a fine-tuning begins with.

    Raises:
        ConfigError: as ``roles``.
    """
    card = base_model.pretrained(parts.base)
    if card is not None:
        path = pipelines.folder(card.pipeline["name"], card.pipeline["variant"])
        network = pipelines.network_bytes(card.pipeline)
        space = elements(path / "vae") * _itemsize(card.pipeline.get("vae_dtype", "float32"))
    elif parts.base.name:
        folder = models.find(Path(parts.base.name))
        network, space = (4 * elements(folder, name) for name in ("weights", "space"))
    else:
        about = parts.base.pretrain
        within = on_disk.parameters(parts.holds.ranks > 1)
        denoiser = models.build(card_of(about, load(about.data, about.size)), within=within)
        network = sum(p.numel() * p.element_size() for p in denoiser.parameters())
        space = sum(
            p.numel() * p.element_size() for p in getattr(denoiser.space, "vae", torch.nn.Module()).parameters()
        )
    return Facts(network, 0, space) if parts.base.lora else Facts(0, network, space)


def elements(folder: Path, stem: str = "") -> int:
    """The elements of all tensors of the safetensors files of a folder, of those whose name begins with ``stem``. Of
    several variants of the same tensors the smallest counts.
    """
    counts: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        variant = PART.sub("", file.name)
        if file.name.startswith(stem):
            with safe_open(file, "pt") as held:
                counts[variant] += sum(math.prod(held.get_slice(name).get_shape()) for name in held.keys())  # noqa: SIM118
    return min(counts.values(), default=0)


def _itemsize(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
