"""Adapters that exist, trained on: they become the trainable part of a pipeline's network, as diffusers loads them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten
from rlfusion.common.hollow import standing_in
from rlfusion.models import lora
from rlfusion.models.pipelines import adapters, hub
from rlfusion.models.pipelines.family import Family
from rlfusion.models.pipelines.model import load

NAME = "default"
"""Of the adapters that are trained, whoever made them."""


def recorded(text: str) -> str:
    """Settings of adapters as a run writes them down: where their file is, and its digest; others as they are.

    Raises:
        ConfigError: there is no such file, or it is no file of adapters.
    """
    settings = lora.parse(text)
    if settings is None or not settings.file or settings.sha256:
        return text
    path = adapters.located(settings.file)
    more = f", dropout={settings.dropout}" if settings.dropout else ""
    return f"LoRA(file={str(path)!r}{more}, sha256={adapters.digest(path)!r})"


def train_on(model: nn.Module, family: Family, about: Mapping[str, Any], settings: lora.LoRA) -> None:
    """Give the network of the pipeline of ``about`` the adapters of ``settings.file``, in float32, as all that is
    trained of it.

    Raises:
        ConfigError: there are none, none that fit, others than the run began with, or some of text encoders, which
            would be left out.
    """
    path = adapters.located(settings.file)
    adapter = adapters.Adapter(str(path), 1.0, settings.sha256 or adapters.digest(path))
    if adapters.on_texts([adapter._asdict()]):
        raise ConfigError(
            f"lora = {shorten(repr(settings.file), LONGEST_PATH)}: it adapts text encoders as well, which are not "
            "trained, expected one of the network alone, or --adapters, which merges both"
        )
    place = hub.folder(about["name"], about["variant"])
    pipe = load(place, dict(about), (*family.texts, "vae"), {family.network: model})
    with standing_in(model):
        adapters.put_on(pipe, adapter._asdict(), family, NAME)
    lora.finish(model, settings)
