"""A diffusers pipeline as a ``Denoiser``: its network, its autoencoder as the space, its scheduler as the own sampler.

What a model card holds of one (``about``), all JSON:

    name        folder or hub id                       dtype          of the network's frozen weights
    variant     of the weights' files ("fp16")         checkpointing  activations computed again in the backward pass
    side        pixels, 0 for the model's own          decode         samples decoded at a time
    vae_dtype   in which they are decoded; float32 where it is absent
    negatives   one a prompt, "" for none              cache          folder of computed embeddings, "" for none
    metadata    one mapping a prompt, or none at all, which rewards may read
    attention    its back end; absent for diffusers' own choice
    max_sequence_length  tokens of a prompt, of families that have that setting; absent for the pipeline's default
    family      of the user's own code, by name; absent where it is found by the pipeline's class
    adapters    folders of trained adapters, and files of others (``adapters``), that are merged, in this order
    scheduler   in the place of the pipeline's own, as Name(setting=...); absent for its own
    quantize    how the linear layers are rounded (``quantized``), once adapters are merged; absent for not at all

Text encoders are loaded only where embeddings are not in the cache, and let go before anything else is.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common.code_files import files_of
from rlfusion.common.deferred import RARE, deferred
from rlfusion.common.errors import ConfigError, OutOfMemory, foreseen
from rlfusion.common.hollow import Filling
from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Denoiser, Denoising, Mix
from rlfusion.models.pipelines import attention, hub, lengths, quantized
from rlfusion.models.pipelines.adapters import adapted, adapted_texts, merged_all, on_texts
from rlfusion.models.pipelines.conditions import Conditions, Rows
from rlfusion.models.pipelines.embeddings import Texts, encoded, kept
from rlfusion.models.pipelines.family import SEQUENCE, Family, Net, plain_grid
from rlfusion.models.pipelines.hollow import network
from rlfusion.models.pipelines.scheduler import Sampling, read
from rlfusion.models.pipelines.space import Decoded

KEPT_AS = 2
"""The form of the files of embeddings: those of another are not looked at."""
PARTS, PART = 64, 2**16
"""How many parts of a file of weights its fingerprint reads, and their bytes."""

NONE: Mapping[str, nn.Module] = {}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Published:
    """The sampler that a pipeline was published with, as ``denoiser.Own``."""

    sampling: Sampling
    conditions: Conditions
    mix: Mix | None = None

    def times(self, steps: int) -> Tensor:
        return self.sampling.times(steps)

    @property
    def guided(self) -> bool:
        return self.conditions.negated

    def null(self, cond: Cond) -> Cond:
        return self.conditions.null(cond)

    def around(self, denoiser: Denoising) -> Denoising:
        return self.sampling.around(denoiser)


def build(
    about: dict[str, Any], prompts: Sequence[str], device: torch.device | str = "cpu", given: nn.Module | None = None
) -> Denoiser:
    """The denoiser of ``about`` for ``prompts``, with its weights, on the CPU; prompts are encoded on ``device``. Where
    a network is ``given`` its weights are not read.

    Raises:
        ConfigError: no such pipeline, one of another family, or a setting that it cannot follow.
    """
    path = hub.folder(about["name"], about["variant"])
    family = hub.family(path, about.get("family", ""))
    read(hub.scheduler(path, about.get("scheduler", "")), plain_grid({}, ()))  # refuses before weights are read
    _require_no_negatives(path, family, about)
    read_by = functools.partial(load, path, about, given={} if given is None else {family.network: given})
    pipe, conditions = _conditions(read_by, path, family, about, prompts, device)
    model = getattr(adapted(pipe, about["adapters"], family) if given is None else pipe, family.network)
    quantized.quantize(model, about.get("quantize", "none"), DTYPES[about["dtype"]])
    if about["checkpointing"]:
        model.enable_gradient_checkpointing()
        if pipe.vae._supports_gradient_checkpointing:
            pipe.vae.enable_gradient_checkpointing()
    if told := about.get("attention"):
        attention.choose(model, told, device, DTYPES[about["dtype"]])
    how = (about["decode"], family.normalises, DTYPES[about.get("vae_dtype", "float32")])
    space = Decoded(pipe.vae, family.channels(model.config), hub.factor(path), *how)
    sampling = read(pipe.scheduler, family.grid(model.config, space.latent(hub.shape(path, about["side"], family))))
    denoiser = Denoiser(Net(model, family, conditions, DTYPES[about["dtype"]]), sampling.schedule, sampling.kind)
    denoiser.space, denoiser.own = space, Published(sampling, conditions, family.mix)
    if family.embeds(model.config):
        denoiser.weights = (-math.inf, math.inf)
    return denoiser


def build_hollow(
    about: dict[str, Any], prompts: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[Denoiser, Filling]:
    """The same without memory for the parameters of the network; and where the rows of each are.

    Raises:
        ConfigError: as ``build``; or files of weights that are not the network's.
    """
    quantized.require_whole(about)
    path = hub.folder(about["name"], about["variant"])
    family = hub.family(path, about.get("family", ""))
    model, filling = network(path, family.network, DTYPES[about["dtype"]], about["variant"])
    denoiser = build(about, prompts, device, model)
    if about["adapters"]:
        pipe = load(path, about, without=family.texts, given={family.network: model})
        filling = merged_all(pipe, model, filling, about["adapters"], family)
    return denoiser, filling


def network_bytes(about: dict[str, Any]) -> int:
    """Bytes of the weights of the network of ``about``, in its dtype, or rounded; 0 where that is not known.

    Raises:
        ConfigError: the pipeline's index cannot be read.
    """
    path = hub.folder(about["name"], about["variant"])
    model = hub.without_memory(path, hub.family(path, about.get("family", "")).network)
    how, itemsize = about.get("quantize", "none"), DTYPES[about["dtype"]].itemsize
    return 0 if model is None else quantized.size(model, how, itemsize)


def outline(about: dict[str, Any]) -> Denoiser:
    """The denoiser of ``about`` without its weights: its schedule and its own times, and no network.

    Raises:
        ConfigError: as ``build``.
    """
    path = hub.folder(about["name"], about["variant"])
    family = hub.family(path, about.get("family", ""))
    config, (_, high, wide) = hub.config(path, family.network), hub.shape(path, about["side"], family)
    latent = (family.channels(config), high // hub.factor(path), wide // hub.factor(path))
    sampling = read(hub.scheduler(path, about.get("scheduler", "")), family.grid(config, latent))
    denoiser = Denoiser(nn.Identity(), sampling.schedule, sampling.kind)
    denoiser.own = Published(sampling, Conditions({"": torch.zeros(0)}, None))
    return denoiser


def _require_no_negatives(path: Path, family: Family, about: dict[str, Any]) -> None:
    """Raise ConfigError for negative prompts of a model that gives no second answer (its guidance is an input)."""
    found = [text for text in about["negatives"] if text]
    if found and (not family.guided or family.embeds(hub.config(path, family.network))):
        raise ConfigError(
            f"negative = {found[0]!r}: the network of {about['name']!r} is given its guidance and no negative prompt "
            "(true CFG is not supported), expected none"
        )


def placed(about: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``about`` as it was saved in ``folder``, with the paths in it that mean that folder."""
    here = str(folder.resolve())
    adapters = [here if place == "." else place for place in about["adapters"]]
    return about | {"name": here if about["name"] == "." else about["name"], "adapters": adapters}


def load(path: Path, about: dict[str, Any], without: Sequence[str] = (), given: Mapping[str, nn.Module] = NONE) -> Any:
    """The pipeline, all of it or without some components, on the CPU. Those that are ``given`` are not read.

    Raises:
        ConfigError: its files cannot be read.
    """
    absent = {name: None for name in without if name in hub.index(path)}
    try:
        library = hub.diffusers()
        with deferred(*RARE):  # a scheduler that is read imports all that are compatible with it
            pipe = library.DiffusionPipeline.from_pretrained(
                path,
                use_safetensors=True,
                variant=about["variant"] or None,
                dtype=DTYPES[about["dtype"]],
                local_files_only=True,
                **absent,
                **given,
            )
    except hub.DAMAGED as error:
        if isinstance(foreseen(error), OutOfMemory):
            raise
        raise ConfigError(f"pipeline {about['name']!r} cannot be loaded: {hub.first_line(error)}") from error
    if told := about.get("scheduler"):
        pipe.register_modules(scheduler=hub.scheduler(path, told))
    return pipe


def _conditions(
    read_by: Callable[..., Any],
    path: Path,
    family: Family,
    about: dict[str, Any],
    prompts: Sequence[str],
    device: torch.device | str,
) -> tuple[Any, Conditions]:
    """The pipeline, as ``load`` reads it, without what reads prompts; and their embeddings, from the cache or computed
    and kept there.
    """
    texts, folder = Texts.of(prompts, about["negatives"]), _cached(path, family, about, prompts)
    distinct, told = list(dict.fromkeys((*texts.prompt, *filter(None, texts.negative)))), _sequence(about)
    lengths.report(path, family, distinct, **told)
    if folder is not None and (held := kept(folder, texts)) is not None:
        return read_by(without=family.texts), held
    pipe = adapted_texts(read_by(), about["adapters"], family)
    how = functools.partial(family.encode, **told) if told else family.encode
    try:
        side = hub.shape(path, about["side"], family)[1]
        held = _encode(pipe, replace(family, encode=how), texts, side, device, folder)
    except OverflowError as error:  # a tokenizer that pads to a limit that it does not have
        raise ConfigError(
            f"pipeline {about['name']!r}: prompts cannot be encoded ({error}): expected tokenizers whose "
            "tokenizer_config.json says model_max_length"
        ) from error
    pipe.register_modules(**{name: None for name in family.texts if name in pipe.components})
    return pipe, held


def _sequence(about: dict[str, Any]) -> dict[str, int]:
    """max_sequence_length as a keyword; none where the card says none."""
    return {SEQUENCE: about[SEQUENCE]} if SEQUENCE in about else {}


@torch.no_grad()
def _encode(
    pipe: Any, family: Family, texts: Texts, side: int, device: torch.device | str, folder: Path | None
) -> Conditions:
    """The embeddings of texts by the pipeline's own encoders, on ``device``."""
    for name in family.texts:
        module = pipe.components.get(name)
        if isinstance(module, nn.Module):
            module.to(device)

    def encode(part: str, text: str) -> Rows | None:
        if part == "prompt":
            return family.encode(pipe, text, None, side, device)[0]
        return family.encode(pipe, texts.prompt[0], text or None, side, device)[1]

    return encoded(texts, encode, folder)


def _cached(path: Path, family: Family, about: dict[str, Any], prompts: Sequence[str]) -> Path | None:
    """The folder of the embeddings, named by all that they depend on: files by ``_fingerprint``."""
    if not about["cache"]:
        return None
    found = sorted(f for name in family.texts for f in (path / name).glob("*") if f.is_file())
    files = [path / hub.INDEX, *found]
    libraries = [version(name) for name in ("diffusers", "transformers")]
    same: list[Any] = [KEPT_AS, [_fingerprint(f) for f in files], libraries, list(prompts)]
    same += [about[name] for name in ("negatives", "variant", "dtype", "side")]
    same += _sequence(about).values()
    same += [one["sha256"] + str(one["scale"]) for one in on_texts(about["adapters"])]
    if own := about.get("family"):
        same += [own, files_of(own)]
    digest = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
    return Path(about["cache"]) / f"embeddings-{digest}"


def _fingerprint(file: Path) -> list[str | int]:
    """What changes with a file: its place, size and time, and the digest of ``PARTS`` parts of ``PART`` bytes all along
    it (all of it where it is no larger), which tells weights that were exchanged under the old size and time.
    """
    stat, digest = file.stat(), hashlib.sha256()
    with file.open("rb") as held:
        for at in range(0, stat.st_size, max(PART, stat.st_size // PARTS)):
            held.seek(at)
            digest.update(held.read(PART))
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns, digest.hexdigest()]
