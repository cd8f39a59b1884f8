"""Finds a pipeline: a diffusers folder, or a name on the hub, of which the library has a copy or fetches one.

Weights are read from safetensors alone: never a pickle, never code from a repository.
"""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlfusion.common import hub, spec
from rlfusion.common.deferred import RARE, deferred, imported_lean, quieten
from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten, unknown
from rlfusion.common.registry import Registry
from rlfusion.models.pipelines.family import Family
from rlfusion.models.pipelines.space import FRAMES
from rlfusion.models.pipelines.typed import require_typed

INDEX = "model_index.json"
EXTRA = "pip install 'rlfusion[models]'"
_MODULES = {
    "StableDiffusionPipeline": "stable_diffusion:FAMILY",
    "LatentConsistencyModelPipeline": "stable_diffusion:FAMILY",
    "StableDiffusionXLPipeline": "stable_diffusion_xl:FAMILY",
    "StableDiffusion3Pipeline": "stable_diffusion_3:FAMILY",
    "FluxPipeline": "flux:FAMILY",
    "ChromaPipeline": "chroma:FAMILY",
    "SanaPipeline": "sana:FAMILY",
    "SanaSprintPipeline": "sana_sprint:FAMILY",
    "AuraFlowPipeline": "aura_flow:FAMILY",
    "Lumina2Pipeline": "lumina_2:FAMILY",
    "PixArtAlphaPipeline": "pixart:ALPHA",
    "PixArtSigmaPipeline": "pixart:SIGMA",
    "HunyuanDiTPipeline": "hunyuan_dit:FAMILY",
    "ZImagePipeline": "z_image:FAMILY",
    "Flux2KleinPipeline": "flux_2:KLEIN",
    "Flux2Pipeline": "flux_2:DEV",
    "QwenImagePipeline": "qwen_image:FAMILY",
}
FAMILIES = Registry(
    "pipeline",
    "rlfusion.families",
    {name: f"rlfusion.models.pipelines.{module}" for name, module in _MODULES.items()},
    Family,
    also="each as --pipeline.family",
)
"""The families by their pipeline's class."""
SINCE = {
    "HunyuanDiTPipeline": "0.28.0",
    "PixArtSigmaPipeline": "0.28.0",
    "AuraFlowPipeline": "0.30.0",
    "SanaPipeline": "0.32.0",
    "SanaSprintPipeline": "0.33.0",
    "Lumina2Pipeline": "0.33.0",
    "ChromaPipeline": "0.34.0",
    "ZImagePipeline": "0.36.0",
    "Flux2KleinPipeline": "0.37.0",
    "Flux2Pipeline": "0.36.0",
    "QwenImagePipeline": "0.37.0",
}
"""The version of diffusers that was the first to have a pipeline."""
UNFIT = {
    r"Audio|Music": "it makes sounds, which no reward here can judge",
    r"Video|T2V|I2V|^Wan|^LTX|CogVideoX|Mochi|Allegro|Latte|Cosmos(?!.*TextToImage)|SkyReels|AnimateDiff|Motion": (
        "it draws videos, whose latents have a time beside height and width"
    ),
    r"2Img|Inpaint|(?<!Model)Edit|Kontext|Fill|Redux|Pix2Pix(?!Zero)|Upscale|SuperResolution|Control|Adapter|Layered": (
        "it is given an image beside the prompt, and a walk here begins with noise and a prompt alone"
    ),
    r"Cascade|Wuerstchen|^Kandinsky(V22|Prior|Pipeline|Combined)|^IF|UnCLIP|Prior": (
        "two networks make its images, one after the other, and one is trained here"
    ),
}
"""Of classes of diffusers by what their names hold: why they do not fit."""
CORRECTED: dict[str, dict[str, Any]] = {"StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False}}
"""What a pipeline itself changes in the settings of its scheduler, where they are there: older files have others."""

REFUSALS = (OSError, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, ImportError)
"""What a scheduler's class raises of settings that it cannot work with."""
DAMAGED = (*REFUSALS, AttributeError, SafetensorError)
"""What the libraries raise of files that are damaged, or are of something else."""
KINDS: dict[str, type | tuple[type, ...]] = {
    **{"in_channels": int, "sample_size": (int, list)},
    **{"block_out_channels": list, "encoder_block_out_channels": list, "temperal_downsample": list},
}
"""What the settings of a component are that its shapes are read from."""


class Component(dict[str, Any]):
    """The settings of a component; asking for one that is not there, or of another kind, is a ConfigError."""

    def __init__(self, held: Mapping[str, Any], place: str) -> None:
        super().__init__(held)
        self.place = place

    def __getitem__(self, name: str) -> Any:
        held = self.get(name)
        if name not in self or not isinstance(held, KINDS.get(name, object)):
            found = shorten(repr(held)) if name in self else "no such setting"
            raise ConfigError(f"{self.place!r}: {name} = {found}, expected the configuration of a component as saved")
        return held


def diffusers() -> Any:
    """The library, quiet.

    Raises:
        ConfigError: it is not installed.
    """
    quieten()
    try:
        with imported_lean():
            import diffusers as library
            import transformers

            for log in (library.utils.logging, transformers.utils.logging):
                log.set_verbosity_error()
                log.disable_progress_bar()
            library.DiffusionPipeline  # noqa: B018  the parts that all pipelines have are imported by this
    except ImportError as error:
        raise ConfigError(f"a pretrained pipeline needs diffusers, transformers and peft: {EXTRA}") from error
    return library


def class_named(name: str) -> Any:
    """The library's class of that name; None where it has none."""
    library = diffusers()
    with imported_lean():
        return getattr(library, name, None)


def first_line(error: Exception) -> str:
    """The kind of an error of a library, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shorten(said[0], LONGEST_PATH)}" if said else type(error).__name__


def is_pipeline(name: str) -> bool:
    """Whether a text names a pipeline: its folder, or something that can only be a name on the hub."""
    if Path(name).exists():
        return (Path(name) / INDEX).is_file()
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "runs/"))


def folder(name: str, variant: str = "") -> Path:
    """The folder of the pipeline that ``name`` names, fetched from the hub if need be.

    Raises:
        ConfigError: there is none, and what to provide.
    """
    if (Path(name) / INDEX).is_file():
        return Path(name)
    if Path(name).exists():
        raise ConfigError(f"{name!r} is no pipeline: expected a diffusers folder with {INDEX}")
    library = diffusers()
    try:
        with hub.fetching():
            held = library.DiffusionPipeline.download(name, variant=variant or None, use_safetensors=True)
    except Exception as error:  # the hub's client has dozens of errors of its own, and requests' beside them
        raise ConfigError(
            f"model {shorten(repr(name), LONGEST_PATH)} is no folder here and cannot be fetched from the hub "
            f"({shorten(hub.failed(error), 140)}): expected a diffusers folder with {INDEX} and "
            ".safetensors weights, or a hub cache (HF_HOME) that holds it"
        ) from error
    return Path(held)


def index(path: Path) -> dict[str, Any]:
    """What ``model_index.json`` says.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return dict(json.loads((path / INDEX).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{str(path / INDEX)!r} cannot be read: {error}") from error


def family(path: Path, named: str = "") -> Family:
    """The family of the pipeline in ``path``: the one that is ``named``, else by the pipeline's class.

    Raises:
        ConfigError: it is of no family that is known, or what is named is none.
    """
    if named:
        held = FAMILIES.find(named).object
        if not isinstance(held, Family):
            raise ConfigError(
                f"family = {named!r} is a class: expected an object, Family(network=..., encode=..., ...)"
            )
        return held
    name = str(index(path).get("_class_name", ""))  # a list where the class comes with code of its own
    if ":" in name:  # a folder names no code that is to be loaded
        raise unknown("pipeline", name, FAMILIES.names())
    try:
        found = FAMILIES.find(name).object
    except ConfigError as error:
        raise ConfigError(f"{error}{_why_not(name)}") from error
    if name in SINCE and class_named(name) is None:
        raise ConfigError(
            f"pipeline {name!r} is not in diffusers {diffusers().__version__}, which is installed: expected "
            f"{SINCE[name]} or newer"
        )
    return replace(found, guided=False) if index(path).get("is_distilled") else found  # which has one answer


def _why_not(name: str) -> str:
    """The reason why a pipeline of the library's does not fit; "" where none is known."""
    why = next((why for held, why in UNFIT.items() if re.search(held, name)), "")
    return f". It does not fit: {why}" if why else ""


def scheduler(path: Path, instead: str = "") -> Any:
    """The pipeline's scheduler, alone, with the settings that the pipeline itself gives it (``CORRECTED``); or the one
    that ``Name(setting=...)`` writes in its place, made of the own one's settings as diffusers makes one of another.

    Raises:
        ConfigError: there is none, one of no class of the library's, or settings that its class refuses.
    """
    own = _scheduler(path)
    if not instead:
        return own
    name, told = spec.split(instead)
    made = class_named(name)
    known = [one for one in dir(diffusers()) if one.endswith("Scheduler")] if not hasattr(made, "set_timesteps") else []
    if known:
        raise unknown("pipeline.scheduler", name, known)
    require_typed(made, told, f"pipeline.scheduler = {instead}")
    if strange := sorted(set(told) - set(inspect.signature(made.__init__).parameters)):
        raise unknown(f"setting of {name}", strange[0], list(inspect.signature(made.__init__).parameters)[1:])
    try:
        return made.from_config(own.config, **told)
    except REFUSALS as error:
        raise ConfigError(f"pipeline.scheduler = {instead}: {first_line(error)}") from error


def _scheduler(path: Path) -> Any:
    """The pipeline's own."""
    told = index(path).get("scheduler")
    if not isinstance(told, list) or len(told) != 2 or not isinstance(name := told[1], str):
        raise ConfigError(f"{str(path / INDEX)!r} names the scheduler {told!r}: expected [library, class]")
    made = class_named(name)
    if made is None:
        raise ConfigError(f"scheduler {name!r}: the library has no such class")
    place = str(path / "scheduler" / "scheduler_config.json")
    try:
        require_typed(made, made.load_config(path / "scheduler"), repr(place))
        with deferred(*RARE):  # it imports every class that its settings would fit
            held = made.from_pretrained(path / "scheduler")
        held.register_to_config(**corrected(str(index(path).get("_class_name", "")), held.config))
        return held
    except ConfigError:
        raise
    except REFUSALS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{place!r}: diffusers makes no {name} of it: {first}; expected settings that it allows"
        ) from error


def corrected(pipeline: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a scheduler that a pipeline of this class changes as it is loaded, with their new values."""
    given = CORRECTED.get(pipeline, {})
    return {name: value for name, value in given.items() if settings.get(name, value) != value}


def config(path: Path, component: str) -> Component:
    """The configuration of a component that is a model.

    Raises:
        ConfigError: it cannot be read.
    """
    file = path / component / "config.json"
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(held, dict):
        raise ConfigError(f"{str(file)!r} holds {type(held).__name__}: expected the configuration of a component")
    return Component(held, str(file))


def parameters(path: Path, component: str) -> int:
    """How many elements the parameters of a component have; 0 where that is not known.

    Raises:
        ConfigError: the pipeline's index cannot be read.
    """
    model = without_memory(path, component)
    return 0 if model is None else sum(p.numel() for p in model.parameters())


def without_memory(path: Path, component: str) -> Any:
    """A component without memory for its parameters; None where that cannot be made: its class is not of diffusers, or
    looks at its parameters as it is made.

    Raises:
        ConfigError: the pipeline's index cannot be read.
    """
    told = index(path).get(component)
    made = class_named(told[1]) if isinstance(told, list) and len(told) == 2 else None
    if made is None:
        return None
    try:
        with torch.device("meta"):
            return made.from_config(made.load_config(path / component))
    except RuntimeError:  # torch's, of an operation that needs memory
        return None


def factor(path: Path) -> int:
    """By how much the autoencoder reduces each side: it halves it between two blocks, or as often as one of videos says
    whether it halves the number of frames as well.
    """
    held = config(path, "vae")
    if FRAMES in held:
        return 2 ** len(held[FRAMES])
    blocks = "block_out_channels" if held.get("block_out_channels") else "encoder_block_out_channels"
    return 2 ** (len(held[blocks]) - 1)


def pipeline_class(path: Path) -> type:
    """The pipeline's class.

    Raises:
        ConfigError: diffusers has none of that name.
    """
    name = index(path).get("_class_name")
    found = class_named(name) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise ConfigError(f"{str(path / INDEX)!r} names the pipeline {name!r}: diffusers has no such class")
    return found


def shape(path: Path, side: int, known: Family) -> tuple[int, int, int]:
    """(3, H, W) of images of ``side`` pixels of a pipeline of a family, 0 for the pipeline's own.

    Raises:
        ConfigError: a side that the latents do not divide.
    """
    found, unit = side or known.side(config(path, known.network)) * factor(path), factor(path) * known.multiple
    if found % unit:
        raise ConfigError(f"size = {found}: expected a multiple of {unit} for this pipeline")
    return 3, found, found
