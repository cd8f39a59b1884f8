"""Low-rank adapters (LoRA, Hu et al. 2021), by the library peft: few trained weights beside frozen ones.

    W x  ->  W x + (alpha / rank) B A x,     A (rank, in) random, B (out, rank) = 0 at the start

A model that is saved has its adapters merged into its weights, so that it needs nothing of this; they are kept beside
it in peft's own format.
"""

import copy
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlfusion.common import shards, spec, storage, streamed
from rlfusion.common.deferred import imported_lean, quieten
from rlfusion.common.errors import ConfigError, require_positive, shorten, unknown
from rlfusion.common.hollow import standing_in
from rlfusion.common.seeding import integer
from rlfusion.common.streamed import Part, part
from rlfusion.common.weights import ADAPTER
from rlfusion.models.lora_dropout import Acting, Dropout

Whole = TypeVar("Whole", bound=nn.Module)
BASE = "base_layer."
"""What the names of a layer's own tensors begin with once it has adapters."""
_alone = threading.RLock()
ASKS = re.compile(r"is_bnb(_\w+)?_available").fullmatch
"""Matches the functions by which peft asks whether bitsandbytes is here."""


@dataclass(frozen=True)
class LoRA:
    """Adapters of the layers (linear or convolution) whose name ends in one of ``targets``; all of them by default.

    Attributes:
        rank: of B A.
        alpha: their strength is alpha / rank, as in peft; None for alpha = rank.
        targets: ends of names ("to_q,to_v"), by commas.
        dropout: the share of a layer's input features that the adapter does not see in an iteration (``dropout``).
        file: adapters that exist, which are trained on: of a pretrained pipeline, a .safetensors file or a folder of
            diffusers, peft or kohya, whose rank, alpha and targets hold.
        sha256: the digest that they had, which a run writes down; empty expects none.
    """

    rank: int = 8
    alpha: float | None = None
    targets: str = ""
    dropout: float = 0.0
    file: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.file and (self.rank, self.alpha, self.targets) != (8, None, ""):
            raise ConfigError(
                f"LoRA(file={shorten(self.file)!r}) has the file's rank, alpha and targets: expected none beside it"
            )
        require_positive(self, "rank")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ConfigError(
                f"alpha = {self.alpha}: expected a finite number > 0, or None for that of rank (0 would switch the "
                "adapters off)"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout = {self.dropout}: expected 0 <= dropout < 1")


def parse(text: str) -> LoRA | None:
    """The adapters that a text like ``LoRA(rank=8)`` writes; none for "".

    Raises:
        ConfigError: another name or setting, or a value that cannot work.
    """
    if not text:
        return None
    if text.strip().lower().endswith(".safetensors"):
        return LoRA(file=text.strip())
    name = spec.split(text)[0]
    if name.lower() != "lora":
        rank = text.strip() if text.strip().isdigit() else "8"
        raise ConfigError(f"lora = {shorten(repr(text))}: expected LoRA(rank={shorten(rank, 10)}), or nothing for none")
    return spec.parse(text, {"LoRA": LoRA}, "adapter")


def written(text: str) -> str:
    """Settings as text of which a file of adapters has its whole path; others as they are."""
    settings = parse(text)
    if settings is None or not settings.file:
        return text
    path = os.path.abspath(os.path.expanduser(settings.file))
    more = f", dropout={settings.dropout}" if settings.dropout else ""
    more += f", sha256={settings.sha256!r}" if settings.sha256 else ""
    return f"LoRA(file={path!r}{more})"


def attach(net: nn.Module, text: str, seed: int = 0, targets: str = "", idle: Sequence[str] = ()) -> None:
    """Give ``net`` the adapters of ``text`` (none for ""), in float32, in place; everything else is frozen. ``targets``
    are its layers where the text names none; ``idle`` layers, which cannot change its answer, get none.

    Raises:
        ConfigError: no package peft, a target that no layer has, or targets that are idle all.
    """
    settings = parse(text)
    if settings is None:
        return
    if settings.file:
        raise ConfigError(f"lora = {text!r}: only a pretrained pipeline has adapters in a file, expected LoRA(rank=8)")
    quieten()
    try:
        with imported_lean():
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"lora = {text!r} needs the package peft: pip install 'rlfusion[lora]'") from error
    layers = [name for name in _layers(net, settings.targets or targets) if name not in idle]
    if not layers:
        raise ConfigError(f"targets = {settings.targets!r} of LoRA: none of them can change what the network answers")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        target_modules="|".join(map(re.escape, layers)),  # a list would mean ends of names
    )
    with standing_in(net), without_bitsandbytes(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer(seed, "adapters"))
        inject_adapter_in_model(config, net)
    finish(net, settings)


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Within, peft does not import bitsandbytes (a second, and 50 MB) to ask whether a layer is one of its: none can be
    where nothing has imported it yet. One thread at a time.
    """
    from peft.tuners.lora import model

    with _alone:
        here = "bitsandbytes" in sys.modules
        asks = {} if here else {name: held for name, held in vars(model).items() if ASKS(name)}
        vars(model).update(dict.fromkeys(asks, lambda: False))
        try:
            yield
        finally:
            vars(model).update(asks)


def finish(net: nn.Module, settings: LoRA) -> None:
    """Let the adapters that a network has be what is trained of it: in float32, with the dropout of the settings."""
    if settings.dropout:
        _drop(net, settings.dropout)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(ADAPTER in name)
        if ADAPTER in name:
            parameter.data = parameter.data.float()


def _drop(net: nn.Module, p: float) -> None:
    """Give the adapters of ``net`` our dropout; in the settings that peft saves there is none."""
    acting = Acting()
    for name, layer in layers_of(net):
        spatial = 2 if isinstance(layer.get_base_layer(), nn.Conv2d) else 0
        layer.lora_dropout["default"] = Dropout(p, layer.in_features, name, spatial, acting)


def _layers(net: nn.Module, targets: str) -> list[str]:
    """The full names of the layers that get adapters."""
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not targets:
        return layers
    chosen: list[str] = []
    for target in targets.split(","):
        found = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not found:
            raise unknown("target of LoRA", target, {name.rpartition(".")[2] for name in layers} | set(layers))
        chosen += found
    return sorted(set(chosen))


def merged(denoiser: Whole) -> Whole:
    """A copy with the adapters merged into the weights; the denoiser itself where it has none."""
    if not layers_of(denoiser):
        return denoiser
    whole = copy.deepcopy(denoiser)
    for name, layer in layers_of(whole):
        layer.merge()
        whole.set_submodule(name, layer.get_base_layer())
    return whole


def split_copy(net: nn.Module, exact: bool) -> nn.Module:
    """A copy of a network that is split, split likewise, with the adapters merged into the weights; all trainable."""
    own = shards.own(next(net.parameters()))
    whole = copy.deepcopy(shards.outline(net))
    for name, layer in layers_of(whole):
        whole.set_submodule(name, layer.get_base_layer())
    made = parts(net, here=True)
    for name, buffer in whole.named_buffers():
        if name in made:
            buffer.copy_(made[name].make())
    filling = {p: partial(_rows, made[name]) for name, p in whole.requires_grad_().named_parameters()}
    shards.split(whole, own.device, exact, filling)
    return whole


def _rows(made: Part, rows: slice) -> Tensor:
    return made.make()[rows].to("cpu", copy=True)


def layers_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers with adapters, and their names."""
    if not any(ADAPTER in name for name in module.state_dict()):
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def parts(denoiser: nn.Module, here: bool) -> dict[str, Part]:
    """The tensors of what ``merged`` gives, which are made one at a time. All ranks make those of what is split
    together, and in one order; those that do not want them ``here`` get nothing in them.
    """
    layers = dict(layers_of(denoiser))
    found: dict[str, Part] = {}
    for name, tensor in denoiser.state_dict().items():
        at = next((at for at in layers if name.startswith(f"{at}.")), "")
        if not at:
            found[name] = part(tensor, partial(_whole, tensor, here))
        elif (inner := name.removeprefix(f"{at}.")).startswith(BASE):
            make = partial(_merged, denoiser, at, here) if inner == f"{BASE}weight" else partial(_whole, tensor, here)
            found[f"{at}.{inner.removeprefix(BASE)}"] = part(tensor, make)
    return found


def _whole(tensor: Tensor, here: bool) -> Tensor:
    full = shards.whole(tensor).detach()
    return full if here else torch.empty(0)


def _merged(denoiser: nn.Module, name: str, here: bool) -> Tensor:
    """The weight of the layer ``name`` with its adapters merged into it."""
    layer: Any = shards.layer(denoiser, name, here)
    if not here:
        return torch.empty(0)
    layer.merge()
    return layer.get_base_layer().weight


def save(folder: Path, net: nn.Module) -> None:
    """Write the adapters of ``net`` as peft does: ``adapter_config.json`` and ``adapter_model.safetensors``. Those that
    are split are gathered, for which all ranks call this.
    """
    from peft import get_peft_model_state_dict

    storage.make_folder(folder)
    held = {
        name: part(tensor, partial(_whole, tensor, storage.writes()))
        for name, tensor in get_peft_model_state_dict(net).items()
    }
    streamed.write(folder / "adapter_model.safetensors", held)
    if storage.writes():
        storage.patiently(lambda: net.peft_config["default"].save_pretrained(str(folder)), folder)
