"""A denoiser from its card: the network with its initial weights, its schedule, its space, and its adapters."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from rlfusion.common import spec
from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError
from rlfusion.common.registry import Registry
from rlfusion.common.seeding import integer
from rlfusion.diffusion import schedule
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.space import Pixels
from rlfusion.models import autoencoder, lora, pipelines
from rlfusion.models.card import Card
from rlfusion.nets.captions import Captions
from rlfusion.nets.guidance import Guidance

_SCHEDULES = "DDPM ScaledLinear VP Cosine ZeroSNR Rectified Trig Karras Geometric"
_NETS = {"ResidualMLP": "mlp", "UNet": "unet", "DiT": "dit", "Points": "points"}

SCHEDULES = Registry(
    "schedule",
    "rlfusion.schedules",
    {name: f"rlfusion.diffusion.schedule:{name}" for name in _SCHEDULES.split()},
    schedule.Schedule,
)
NETS = Registry(
    "network",
    "rlfusion.networks",
    {name: f"rlfusion.nets.{module}:{name}" for name, module in _NETS.items()},
    nn.Module,
)


def build(
    card: Card,
    seed: int = 0,
    device: torch.device | str = "cpu",
    within: AbstractContextManager[None] | None = None,
) -> Denoiser:
    """A denoiser with initial weights keyed by ``seed``; of a pretrained pipeline, with its own, and with prompts that
    are encoded on ``device``. A network that is no pipeline's is made ``within`` a context, such as that of
    ``common.hollow`` or ``common.on_disk``; the space in which it denoises is not.

    Raises:
        ConfigError: an unknown network, schedule, kind or setting of one.
    """
    if card.pipeline:
        return pipelines.build(card.pipeline, card.names, device)
    config = card.config
    space = autoencoder.build(card.autoencoder) if card.autoencoder else Pixels()
    with within or nullcontext(), initial(seed):
        net = make_net(config.net, space.latent(card.shape), card.classes)
        width = _width(net, config.net) if card.captioned or card.weights else 0
        if card.captioned:
            net.label = Captions(card.names, width)
        if card.weights:
            net.label = Guidance(net.label, width)
    denoiser = Denoiser(net, spec.parse(config.schedule, SCHEDULES, "schedule"), config.kind)
    denoiser.space, denoiser.weights = space, card.weights or None
    if card.boundary:
        return spec.parse(card.boundary, {"LCM": partial(LCM, denoiser)}, "boundary")
    return denoiser


@contextmanager
def initial(seed: int) -> Iterator[None]:
    """Within the context torch's global generator gives the initial weights of ``seed``; it is then as before."""
    state = torch.get_rng_state()
    torch.manual_seed(integer(seed, "initial weights"))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def make_net(text: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network that a text like ``ResidualMLP(width=128, depth=3)`` writes, for x (B, *shape).

    Raises:
        ConfigError: an unknown network or setting of one.
    """
    name, settings = spec.split(absolute(text))
    given = {"shape": shape, "classes": classes}
    if settings.keys() & given:
        raise ConfigError(f"net = {text!r}: shape and classes come from the data, expected other settings")
    return spec.make(NETS, NETS.find(name), {**settings, **given})


def _width(net: nn.Module, text: str) -> int:
    """The length of the vector that a network's ``label`` gives it of its condition.

    Raises:
        ConfigError: it has none, and captions or a guidance weight could not be brought in.
    """
    held = getattr(net, "label", None)
    if not isinstance(held, nn.Embedding):
        raise ConfigError(
            f"net = {text!r} reads its condition by nothing that is called label: for captions, or guidance weights as "
            "an input, expected label = nn.Embedding(classes + 1, width)"
        )
    return held.embedding_dim


def require_trainable(card: Card) -> None:
    """Raise ConfigError where all weights of a pipeline cannot be trained: in low precision."""
    if (dtype := card.pipeline["dtype"]) != "float32":
        raise ConfigError(f"dtype = {dtype}: whole weights are trained in float32, expected that or adapters (lora)")
    if how := card.pipeline.get("quantize"):
        raise ConfigError(f"quantize = {how}: rounded weights are not trained, expected none, or adapters (lora)")


def adapt(denoiser: Denoiser, card: Card, text: str, seed: int = 0) -> None:
    """Give a model the adapters of ``text`` (none for ""); a pretrained one, unless told otherwise, in its attention.

    Raises:
        ConfigError: as ``lora.attach``; or frozen weights of low precision, with nothing else to train.
    """
    if not card.pipeline:
        lora.attach(denoiser.net, text, seed)
        return
    if not text:
        require_trainable(card)
    net, settings = denoiser.net, lora.parse(text)
    if settings is not None and not net.family.adaptable:
        raise ConfigError(
            f"lora = {text!r}: diffusers has no adapters (LoRA) for pipelines of this family, expected none, which "
            "trains all weights"
        )
    if settings is not None and settings.file:
        pipelines.train_on(net.model, net.family, card.pipeline, settings)
        return
    lora.attach(net.model, text, seed, net.family.targets, net.family.idle(net.model))
