"""Supervised training on several ranks: pretraining, autoencoders and distillation, as small as they can be."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distilled import CARD, CPU, SHAPE, STUDENTS, images, scrambled, settings_of
from distilled import run as distilled
from ranked import Form
from safetensors.torch import load_file
from torch import Tensor, nn

from rlfusion import models
from rlfusion.common import shards, storage
from rlfusion.config import Autoencode
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.jobs import pretrain_autoencoder
from rlfusion.models import autoencoder
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.pretrain import Config, Learner
from rlfusion.training import checkpoint
from rlfusion.training.devices import place
from rlfusion.training.ranks import Ranks, current, joined

BATCH = 10
"""In 4 shares of 3, 3, 2 and 2."""

OBJECTIVES = {
    "Denoising(times='LogitNormal()')": ("v", "Cosine()"),
    "ESM(reference=8, times='Uniform(margin=0.01)')": ("eps", "VP()"),
    "ISM(probes=2, times='Uniform(margin=0.01)')": ("eps", "VP()"),
    "SSM(times='Uniform(margin=0.01)')": ("eps", "VP()"),
    "CT(s1=8)": ("CM(sigma_data=0.75)", "Karras()"),
    "ICT(s0=4, s1=8, mean=0.5)": ("CM(sigma_data=0.75)", "Karras()"),
    "SCT(rise=2)": ("TrigFlow()", "Trig()"),
}
"""Pretraining objectives, and the kind and schedule of the network."""

FITS = [*OBJECTIVES, "dropout", "augmented", "autoencoder"]
METHODS = {
    "cd": {"steps": 2},
    "cd by heun": {"steps": 2, "solver": "heun"},
    "lcm": {"steps": 2},
    "ct": {"steps": 2},
    "scd": {"steps": 1},
    "pd": {"steps": 1, "start": 8},
    "guided_pd": {"steps": 1, "first": 1, "start": 4},
    "sds": {"steps": 2},
    "vsd": {"steps": 2},
    "dmd": {"steps": 2},
    "dmd of few": {"steps": 4, "batch": 4, "regression": 0.0, "r1": 0.0},
    "add": {"steps": 2, "noised": True},
    "reflow": {"steps": 1},
    "regression": {"steps": 2},
}
"""Distillation methods (and forms of them), and how they differ from the small runs of ``distilled``."""


class Dropping(nn.Module):
    """A network with torch's own dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = ResidualMLP(SHAPE, 3, width=16, depth=1), nn.Dropout(0.3)

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.net(self.drop(x), t, cond)


def denoiser(fit: str) -> Denoiser:
    if fit == "dropout":
        torch.manual_seed(0)
        return Denoiser(Dropping(), models.build(CARD).schedule, "v")
    kind, schedule = OBJECTIVES.get(fit, ("v", "Cosine()"))
    return scrambled(replace(CARD, config=replace(CARD.config, kind=kind, schedule=schedule)))


def learner(fit: str, split: bool = False) -> Any:
    if fit == "autoencoder":
        module = autoencoder.KLVAE(SHAPE, autoencoder.Config(channels=1, width=4))
        draw = torch.Generator().manual_seed(0)
        for p in module.parameters():
            p.data.normal_(std=0.2, generator=draw)
        if split:
            pretrain_autoencoder.split(module, CPU)
        return pretrain_autoencoder.Learner(module, images(), Autoencode(batch=BATCH, steps=4))
    loss = fit if fit in OBJECTIVES else "Denoising()"
    augment = "Augment(flip=0.5, shift=1)" if fit == "augmented" else ""
    held = denoiser(fit)
    place(held, held.net, CPU, split)
    return Learner(held, images(), Config(loss=loss, batch=BATCH, steps=4, warmup=1, augment=augment))


def fitted(fit: str, split: bool = False) -> tuple[str, list[dict[str, float]], list[float]]:
    """A digest of all that a few updates leave, their metrics, and the weights."""
    made = learner(fit, split)
    metrics = [made.update(step) for step in range(2)]
    optimization = made.optimization
    weights = torch.cat([shards.whole(p).detach().flatten() for p in optimization.named.values()])
    return digest(made.state_dict()), metrics, weights.tolist()


def digest(state: Any) -> str:
    held = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            held.update(shards.whole(value).contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for name in sorted(value, key=str):
                held.update(str(name).encode())
                take(value[name])
        elif isinstance(value, list | tuple):
            for one in value:
                take(one)
        else:
            held.update(repr(value).encode())

    take(state)
    return held.hexdigest()


def method(name: str, folder: Path, stop: int | None = None, split: bool = False) -> tuple[str, list[dict[str, float]]]:
    """The run of a method in ``folder``, to the end or to ``stop`` updates: a digest of all that it leaves, and the
    metrics.
    """
    kind = name.partition(" ")[0]
    settings = settings_of(kind, STUDENTS.get(kind), **{"batch": BATCH, "warmup": 1} | METHODS[name])
    metrics = distilled(settings, CARD, folder, stop, split)
    current().exchange(b"")  # the first rank has written
    state = checkpoint.load(checkpoint.latest(folder / "checkpoints").path)
    return digest([state, (folder / "model" / "weights.safetensors").read_bytes()]), metrics


def work(rank: int, count: int, forms: list[tuple[Form, list[str], list[str]]], folder: str) -> list[dict[str, Any]]:
    """Fits and methods in each form, in the hands of ``rank``; what files there are, the first writes."""
    told = []
    for n, (form, fits, methods) in enumerate(forms):
        with joined(Ranks(rank, count, *form[:2])), storage.silent() if rank else nullcontext():
            found = {fit: fitted(fit, *form[2:]) for fit in fits}
            told.append(found | {name: method(name, Path(folder) / f"{n}-{name}", None, *form[2:]) for name in methods})
    return told


def student(folder: Path) -> list[float]:
    """The weights that a method left."""
    tensors = load_file(folder / "model" / "weights.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).tolist()


def begun(rank: int, count: int, form: Form, name: str, folder: str) -> None:
    """The first update of a method in the hands of ``rank``."""
    with joined(Ranks(rank, count, *form[:2])), storage.silent() if rank else nullcontext():
        method(name, Path(folder), 1, *form[2:])


def alone(form: Form, call: Callable[..., Any], *arguments: Any) -> Any:
    """The same of one process."""
    with joined(Ranks(0, 1, *form)):
        return call(*arguments)
