"""Models: how a denoiser is described, built, saved and loaded.

A model folder holds ``weights.safetensors`` and ``model.json``: everything that is needed to build the denoiser again.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rlfusion import schedule, spec
from rlfusion.denoiser import Denoiser
from rlfusion.errors import ConfigError
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.unet import UNet
from rlfusion.seeding import integer

FORMAT = "rlfusion-model-1"

SCHEDULES: Mapping[str, Callable[..., schedule.Schedule]] = {
    "DDPM": schedule.DDPM,
    "Cosine": schedule.Cosine,
    "Rectified": schedule.Rectified,
    "Trig": schedule.Trig,
}
NETS: Mapping[str, Callable[..., nn.Module]] = {"ResidualMLP": ResidualMLP, "UNet": UNet}


@dataclass(frozen=True)
class Config:
    """Architecture of a denoiser trained here.

    Attributes:
        net: the network, ResidualMLP(width=..., depth=...) or UNet(...).
        schedule: the noise schedule, one of DDPM(), Cosine(), Rectified(), Trig().
        kind: what the network predicts: x0, eps, v, score or flow.
    """

    net: str = "ResidualMLP(width=128, depth=3)"
    schedule: str = "Cosine()"
    kind: str = "x0"


@dataclass(frozen=True)
class Card:
    """What a model folder says of its model: the architecture, the shape (C, H, W) of a sample, the classes' names."""

    config: Config
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.names)

    @classmethod
    def from_json(cls, card: dict) -> "Card":
        return cls(Config(**card["config"]), tuple(card["shape"]), tuple(card["names"]))


def build(card: Card, seed: int = 0) -> Denoiser:
    """A denoiser with initial weights keyed by ``seed``.

    Raises:
        ConfigError: an unknown network, schedule, kind or setting of one.
    """
    config = card.config
    name, settings = spec.split(config.net)
    factory = spec.lookup(NETS, name, "network")
    state = torch.get_rng_state()
    torch.manual_seed(integer(seed, "initial weights"))
    net = spec.call(factory, {"shape": card.shape, "classes": card.classes, **settings}, f"network {name!r}")
    torch.set_rng_state(state)
    return Denoiser(net, spec.parse(config.schedule, SCHEDULES, "schedule"), config.kind)


def save(folder: Path, denoiser: nn.Module, card: Card) -> None:
    """Write a model folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in denoiser.state_dict().items()}
    save_file(tensors, folder / "weights.safetensors.tmp")
    os.replace(folder / "weights.safetensors.tmp", folder / "weights.safetensors")
    (folder / "model.json.tmp").write_text(json.dumps({"format": FORMAT, **asdict(card)}, indent=1))
    os.replace(folder / "model.json.tmp", folder / "model.json")


def find(path: Path) -> Path:
    """The model folder that ``path`` names: itself, or the ``model`` folder of a run.

    Raises:
        ConfigError: neither holds a ``model.json``.
    """
    for candidate in (path, path / "model"):
        if (candidate / "model.json").is_file():
            return candidate
    raise ConfigError(f"{str(path)!r} is no model: expected a folder with model.json, or a finished run's folder")


def load_card(path: Path) -> Card:
    """The card of the model that ``path`` names.

    Raises:
        ConfigError: no model there, or one of another format.
    """
    folder = find(path)
    held = json.loads((folder / "model.json").read_text())
    if held.get("format") != FORMAT:
        raise ConfigError(f"{str(folder)!r} has format {held.get('format')!r}: expected {FORMAT!r}")
    return Card.from_json(held)


def load(path: Path) -> tuple[Denoiser, Card]:
    """The denoiser and card of the model that ``path`` names.

    Raises:
        ConfigError: no model there, unreadable weights, or weights of another architecture.
    """
    card, file = load_card(path), find(path) / "weights.safetensors"
    denoiser = build(card)
    try:
        denoiser.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"weights {str(file)!r} cannot be loaded: {error}") from error
    return denoiser, card
