"""Reading a model's folder, a run's, or a pretrained pipeline."""

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from rlfusion.common import hollow, on_disk
from rlfusion.common.code_files import found_again
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import read_file, sha256, unpack
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.models import pipelines
from rlfusion.models.build import build
from rlfusion.models.card import Card, Config
from rlfusion.models.save import FORMAT, UNSEALED, WEIGHTS
from rlfusion.models.seal import digest as digest_of
from rlfusion.models.seal import require_files, require_seal


def of_pipeline(name: str, settings: pipelines.Settings, negative: str, cache: Path | None) -> Card:
    """The card of a pretrained pipeline by its folder or hub id.

    Raises:
        ConfigError: no such pipeline, one that is not known, no prompts, or a size that does not fit.
    """
    about, texts = settings.about(name, negative, cache)
    path = pipelines.folder(name, settings.variant)
    config = Config(pipelines.index(path)["_class_name"], pipelines.index(path)["scheduler"][1], "of the scheduler")
    shape = pipelines.shape(path, settings.size, pipelines.family_of(path, settings.family))
    return Card(config, shape, texts, pipeline=about | settings.sequence(path))


def describe(name: str, settings: pipelines.Settings, negative: str = "", cache: Path | None = None) -> Card:
    """The card of a model folder, of a run's, or of a pretrained pipeline by its folder or hub id.

    ``settings`` give a pipeline its prompts; of a saved one they replace those that it was trained on, and what else is
    said replaces what it was saved with.

    Raises:
        ConfigError: there is no such model, or the settings do not fit it.
    """
    if pipelines.is_pipeline(name):
        return of_pipeline(name, settings, negative, cache)
    card = load_card(Path(name))
    if not card.pipeline:
        if settings != pipelines.Settings():
            raise ConfigError(f"pipeline.* is given, and {name!r} is no pretrained pipeline: expected none")
        return card
    card = replace(card, pipeline=card.pipeline | settings.over(name, card.pipeline))
    if settings.size or settings.max_sequence_length:
        card = _resized(card, settings)
    if not settings.prompts:
        return card
    about, texts = settings.prompted(negative)
    return replace(card, names=texts, pipeline=card.pipeline | about)


def _resized(card: Card, settings: pipelines.Settings) -> Card:
    """The card of a saved pipeline for images, and prompts, of another size."""
    about = card.pipeline
    path, family = pipelines.folder(about["name"], about["variant"]), about.get("family", "")
    if settings.max_sequence_length:
        about = about | replace(settings, family=family).sequence(path)
    return replace(card, shape=pipelines.shape(path, about["side"], pipelines.family_of(path, family)), pipeline=about)


def load_space(denoiser: Denoiser, blob: bytes | None) -> None:
    """Give a built denoiser the weights of its autoencoder; None for pixels."""
    if blob is not None:
        denoiser.space.module.load_state_dict(unpack(blob))


def find(path: Path) -> Path:
    """The model folder that ``path`` names: itself, or the ``model`` folder of a run.

    Raises:
        ConfigError: neither holds a ``model.json``.
    """
    for candidate in (path, path / "model"):
        if (candidate / "model.json").is_file():
            return candidate
    if pipelines.is_lora(path):
        raise ConfigError(
            f"model {str(path)!r} holds adapters (LoRA) and no model: expected the pipeline that they were trained on "
            f"as --model, and beside it --adapters {path} (merged) or --lora {path} (trained on)"
        )
    if path.suffix == ".safetensors" and path.is_file():
        raise ConfigError(
            f"model {str(path)!r} is a file of weights: expected a diffusers folder with model_index.json (diffusers' "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER) makes one)"
        )
    raise ConfigError(f"{str(path)!r} is no model: expected a folder with model.json, or a finished run's folder")


def _placed(held: dict, file: Path) -> dict:
    """A description with the files of the user's own code where they are now.

    Raises:
        ConfigError: one is not there, or not as it was.
    """
    sources = held.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(digest, str) for digest in sources.values()):
        raise ConfigError(f"{str(file)!r}: sources = {sources!r}, expected SHA-256 by path")
    text = json.dumps(held)
    for old, new in found_again(sources, f"model {str(file.parent)!r}").items():
        text = text.replace(json.dumps(f"{old}:")[:-1], json.dumps(f"{new}:")[:-1])
    return json.loads(text) if sources else held


def digest(path: Path) -> str:
    """SHA-256 of the description of the model that ``path`` names, which states that of its weights."""
    return sha256(read_file(find(path) / "model.json"))


def load_card(path: Path) -> Card:
    """The card of the model that ``path`` names.

    Raises:
        ConfigError: no model there, one of another format, or a file that cannot be understood.
    """
    held, file = _read_about(path)
    held = _placed(held, file)
    try:
        card = Card.from_json(held)
        if not card.pipeline:
            return card
        require_files(held.get("files"), file.parent)
        return replace(card, pipeline=pipelines.placed(card.pipeline, file.parent))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{str(file)!r} is no model's description: {type(error).__name__}: {error}") from error


def _read_about(path: Path) -> tuple[dict, Path]:
    """The content and the path of ``model.json``."""
    file = find(path) / "model.json"
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(held, dict) or held.get("format") not in (FORMAT, UNSEALED):
        raise ConfigError(f"{str(file)!r} is of another format: expected {FORMAT!r}")
    if held["format"] == FORMAT:
        require_seal(held, file)
    return held, file


def load(path: Path) -> tuple[Denoiser, Card]:
    """The denoiser and card of the model that ``path`` names.

    Raises:
        ConfigError: no model there, weights that are not the saved ones, or weights of another architecture.
    """
    card, folder, about = load_card(path), find(path), _read_about(path)[0]
    if card.pipeline:
        return build(card), card
    denoiser = _built(card, folder)
    load_into(denoiser, folder / WEIGHTS, about.get("sha256"))
    _load_space(denoiser, card, folder, about)
    return denoiser, card


class Hollow(NamedTuple):
    """A model whose network has no memory for its parameters, and where the rows of each are."""

    denoiser: Denoiser
    card: Card
    filling: hollow.Filling


def load_hollow(path: Path) -> Hollow:
    """The model that ``path`` names, which is no pipeline, for ranks over which its network is split.

    Raises:
        ConfigError: as ``load``; or a network that makes buffers of its parameters.
    """
    card, folder, about = load_card(path), find(path), _read_about(path)[0]
    denoiser = _built(card, folder, hollow.parameters())
    hollow.require_buffers(denoiser, f"net = {card.config.net!r}")
    filling = _filling(denoiser, folder / WEIGHTS, about.get("sha256"))
    _load_space(denoiser, card, folder, about)
    return Hollow(denoiser, card, filling)


def load_on_disk(path: Path) -> tuple[Denoiser, Card]:
    """As ``load``, with the network's parameters in files (``common.on_disk``): for ranks that soon split it.

    Raises:
        ConfigError: as ``load``; or a network that makes buffers of its parameters.
    """
    card = load_card(path)
    denoiser, _, filling = build_hollow(card) if card.pipeline else load_hollow(path)
    on_disk.fill(denoiser, filling)
    return denoiser, card


def build_hollow(card: Card, device: torch.device | str = "cpu") -> Hollow:
    """The same of a pretrained pipeline, whose prompts are encoded on ``device``.

    Raises:
        ConfigError: as ``build``; or files of weights that are not the network's.
    """
    denoiser, filling = pipelines.build_hollow(card.pipeline, card.names, device)
    return Hollow(denoiser, card, filling)


def _built(card: Card, folder: Path, within: AbstractContextManager[None] | None = None) -> Denoiser:
    try:
        return build(card, within=within)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{str(folder / 'model.json')!r} describes no model: {error}") from error


def _load_space(denoiser: Denoiser, card: Card, folder: Path, about: dict) -> None:
    if card.autoencoder:
        load_into(denoiser.space.module, folder / "space.safetensors", about.get("space_sha256"))


def _filling(denoiser: Denoiser, file: Path, stated: Any) -> hollow.Filling:
    """As ``load_into``, of which rows are read when they are wanted."""
    _require_stated(file, stated)
    try:
        if digest_of(file) != stated:
            raise ConfigError(_damaged(file))
        return hollow.filling(denoiser, hollow.Files.of(file), {name: name for name in denoiser.state_dict()})
    except (OSError, SafetensorError, hollow.Misfit) as error:
        raise ConfigError(f"weights {str(file)!r} cannot be loaded: {error}") from error


def _require_stated(file: Path, stated: Any) -> None:
    if not isinstance(stated, str):
        raise ConfigError(
            f"weights {str(file)!r}: their description states no SHA-256, expected a model as it was saved"
        )


def _damaged(file: Path) -> str:
    return f"weights {str(file)!r} are damaged: they do not match the SHA-256 in {file.parent.name}"


def load_into(module: nn.Module, file: Path, stated: Any) -> None:
    """Load the weights in ``file``.

    Raises:
        ConfigError: no file, weights of another architecture, or not of the stated SHA-256; or none is stated.
    """
    _require_stated(file, stated)
    try:
        blob = read_file(file)
        if sha256(blob) != stated:
            raise ConfigError(_damaged(file))
        module.load_state_dict(unpack(blob))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"weights {str(file)!r} cannot be loaded: {error}") from error
