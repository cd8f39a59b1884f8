"""Models: how a denoiser is described, built, saved and loaded.

A model folder holds ``weights.safetensors`` and ``model.json``: everything that is needed to build the denoiser again,
and the SHA-256 of the weights. (A ``model.json`` written by hand may leave that out.)
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rlfusion import schedule, spec
from rlfusion.denoiser import Denoiser
from rlfusion.errors import ConfigError
from rlfusion.nets.captions import Captions
from rlfusion.nets.dit import DiT
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.unet import UNet
from rlfusion.seeding import integer
from rlfusion.weights import pack, sha256, unpack

FORMAT = "rlfusion-model-1"

SCHEDULES: Mapping[str, Callable[..., schedule.Schedule]] = {
    "DDPM": schedule.DDPM,
    "ScaledLinear": schedule.ScaledLinear,
    "VP": schedule.VP,
    "Cosine": schedule.Cosine,
    "ZeroSNR": schedule.ZeroSNR,
    "Rectified": schedule.Rectified,
    "Trig": schedule.Trig,
    "Karras": schedule.Karras,
    "Geometric": schedule.Geometric,
}
NETS: Mapping[str, Callable[..., nn.Module]] = {"ResidualMLP": ResidualMLP, "UNet": UNet, "DiT": DiT}


@dataclass(frozen=True)
class Config:
    """Architecture of a denoiser trained here.

    Attributes:
        net: the network, ResidualMLP(width=..., depth=...), UNet(width=..., multipliers=..., depth=..., attention=...)
            or DiT(patch=..., width=..., depth=..., heads=...); the last two take recompute=True, to save memory.
        schedule: the noise schedule, one of DDPM(), ScaledLinear(), VP(), Cosine(), ZeroSNR(base=...), Rectified(),
            Trig(), Karras(), Geometric().
        kind: what the network predicts: x0, eps, v, v_handbook, score, flow, InstaFlow(), TrigFlow(sigma_data=...),
            EDM(sigma_data=...) or CM(sigma_data=..., t_min=...).
    """

    net: str = "ResidualMLP(width=128, depth=3)"
    schedule: str = "Cosine()"
    kind: str = "x0"


@dataclass(frozen=True)
class Card:
    """What a model folder says of its model: the architecture, the shape (C, H, W) of a sample, the classes' names, the
    settings of the chain that it was made with (``chain.Chain``; empty for none in particular), and whether the names
    are captions, which the network reads.
    """

    config: Config
    shape: tuple[int, ...]
    names: tuple[str, ...]
    chain: dict[str, Any] = field(default_factory=dict)
    captioned: bool = False

    @property
    def classes(self) -> int:
        return len(self.names)

    @classmethod
    def from_json(cls, card: dict) -> "Card":
        """The card whose ``asdict`` went through JSON; other keys are ignored."""
        return cls(
            Config(**card["config"]),
            tuple(card["shape"]),
            tuple(card["names"]),
            card.get("chain", {}),
            card.get("captioned", False),
        )


def build(card: Card, seed: int = 0) -> Denoiser:
    """A denoiser with initial weights keyed by ``seed``.

    Raises:
        ConfigError: an unknown network, schedule, kind or setting of one.
    """
    config = card.config
    name, settings = spec.split(config.net)
    factory = spec.lookup(NETS, name, "network")
    given = {"shape": card.shape, "classes": card.classes}
    if settings.keys() & given:
        raise ConfigError(f"net = {config.net!r}: shape and classes come from the data, expected other settings")
    state = torch.get_rng_state()
    torch.manual_seed(integer(seed, "initial weights"))
    net = spec.call(factory, {**settings, **given}, f"network {name!r}")
    if card.captioned:
        net.label = Captions(card.names, net.label.embedding_dim)
    torch.set_rng_state(state)
    return Denoiser(net, spec.parse(config.schedule, SCHEDULES, "schedule"), config.kind)


def save(folder: Path, denoiser: nn.Module, card: Card) -> None:
    """Write a model folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    blob = pack(denoiser.state_dict())
    about = {"format": FORMAT, **asdict(card), "sha256": sha256(blob)}
    for name, content in (("weights.safetensors", blob), ("model.json", json.dumps(about, indent=1).encode())):
        (folder / f"{name}.tmp").write_bytes(content)
        os.replace(folder / f"{name}.tmp", folder / name)


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
        ConfigError: no model there, one of another format, or a file that cannot be understood.
    """
    held, file = _read_about(path)
    try:
        return Card.from_json(held)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{str(file)!r} is no model's description: {type(error).__name__}: {error}") from error


def _read_about(path: Path) -> tuple[dict, Path]:
    """The content and the path of ``model.json``."""
    file = find(path) / "model.json"
    try:
        held = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise ConfigError(f"{str(file)!r} is of another format: expected {FORMAT!r}")
    return held, file


def load(path: Path) -> tuple[Denoiser, Card]:
    """The denoiser and card of the model that ``path`` names.

    Raises:
        ConfigError: no model there, weights that are not the saved ones, or weights of another architecture.
    """
    card, file = load_card(path), find(path) / "weights.safetensors"
    denoiser, stated = build(card), _read_about(path)[0].get("sha256")
    try:
        blob = file.read_bytes()
        if stated is not None and sha256(blob) != stated:
            raise ConfigError(f"weights {str(file)!r} are damaged: they do not match the SHA-256 in model.json")
        denoiser.load_state_dict(unpack(blob))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"weights {str(file)!r} cannot be loaded: {error}") from error
    return denoiser, card
