"""Defaults that are not those of the settings' class: what the arguments name, a model or a recipe, brings its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlfusion.cli import words
from rlfusion.cli.settings_text import load, load_file
from rlfusion.common import spec
from rlfusion.common.code_files import absolute
from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten, unknown

PIPELINE_DEFAULTS: dict[str, dict[str, Any]] = {
    "finetune": {"evaluation.samples": 64, "monitor.samples": 64},
    "compare": {"evaluation.samples": 64},
    "sample": {"count": 8, "scale": 1},
    "evaluate": {"evaluation.samples": 64},
    "check-model": {},
    "check-reward": {},
}
"""Defaults of the commands where the model is a pretrained pipeline."""
CHOICES = ("form", "ratio", "fused", "epochs", "updates_per_epoch")
"""Settings of agents on which their own defaults depend."""

TRAINING = ("finetune", "compare", "check-model")
"""The commands whose chain is one to train."""
DATA: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("finetune", "compare", "distill"), ("pretrain",)),
    **dict.fromkeys(("evaluate", "check-reward"), ()),
}
"""The commands that read data beside a model, and the group in which their settings have them."""
ROLLING = ("finetune", "compare")
"""The commands that have rollout.prompts."""


def told_last(arguments: list[str], *key: str) -> Any:
    """The value that the arguments, or the configuration files among them, give a setting last; None for none."""
    told = None
    for option, text in words.read("", arguments):
        place = tuple(option.split("."))
        if place == key:
            told = text
        elif text is not None and (option == "config" or key[: len(place)] == place):
            held: Any = mapping_of(option, text)
            for name in key if option == "config" else key[len(place) :]:
                held = held.get(name) if isinstance(held, dict) else None
            told = told if held is None else held
    return told


def mapping_of(option: str, text: str) -> dict[str, Any]:
    """The settings after --config or after the name of a group: a file, or YAML between braces."""
    if not text.lstrip().startswith("{"):
        if option != "config" and not Path(text).suffix:
            raise ConfigError(
                f"{option} = {shorten(repr(text))}: expected a mapping of settings, or a YAML file of them"
            )
        return load_file(text)
    held = load(text, f"--{option}")
    if not isinstance(held, dict):
        raise ConfigError(f"--{option} {shorten(repr(text))}: expected a mapping of settings")
    return held


def model_defaults(command: str, arguments: list[str], option: str) -> dict[str, Any]:
    """The chain that the model of an option was made with, as defaults, and of a pretrained pipeline numbers that suit
    its size; none for no model.
    """
    from rlfusion import models
    from rlfusion.models import pipelines

    name = told_last(arguments, option)
    rolls = command in ROLLING and told_last(arguments, "rollout", "prompts") is None
    if not name:
        return _fitting(_classes(arguments)) if rolls else {}
    if pipelines.is_pipeline(name):
        told = _named(arguments)
        few = PIPELINE_DEFAULTS[command]
        chain = pipelines.defaults(name, command in TRAINING, told, _file(arguments))
        few = few | _sizes(command, arguments, {"name": name, "variant": told.variant, "family": told.family})
        if scheduler := pipelines.brought_scheduler(name, told, _file(arguments)):
            few = few | {"pipeline.scheduler": scheduler}
        few = few | (_fitting(_prompts(arguments, 1)) if rolls else {})
    else:
        card = models.load_card(Path(name))
        chain, few = _chain(card, command, arguments), PIPELINE_DEFAULTS[command] if card.pipeline else {}
        few = few | (_sizes(command, arguments, card.pipeline) if card.pipeline else {})
        few = few | (_fitting(_prompts(arguments, card.classes) if card.pipeline else card.classes) if rolls else {})
    if few and command == "finetune":
        few = few | _of_agent(arguments)
    few = few | ({} if pipelines.is_pipeline(name) else _of_data(command, arguments, option, name))
    return few | {f"chain.{key}": value for key, value in chain.items()}


def data_defaults(command: str, arguments: list[str], option: str) -> dict[str, Any]:
    """The data that the model of an option was pretrained on, as defaults; none for no model, or one of the hub."""
    from rlfusion.models import pipelines

    name = told_last(arguments, option)
    return _of_data(command, arguments, option, name) if name and not pipelines.is_pipeline(name) else {}


def _of_data(command: str, arguments: list[str], option: str, name: str) -> dict[str, Any]:
    """The data that a saved model was pretrained on, where it says so and no others are told; where they are told, how
    they were read and split.

    Raises:
        ConfigError: they are gone.
    """
    from rlfusion import models
    from rlfusion.data import sources

    place = DATA.get(command)
    if place is None:
        return {}
    held, told = models.load_card(Path(name)).data, told_last(arguments, *place, "data")
    if not held or (told is not None and sources.absolute(str(told)) != held["data"]):
        return {}
    if gone := sources.missing(held["data"]):
        raise ConfigError(
            f"{option} = {shorten(repr(name))} was pretrained on {shorten(gone, LONGEST_PATH)}, which is not there any "
            f"more: expected --{'.'.join((*place, 'data'))} of where it is now"
        )
    return {".".join((*place, key)): held[key] for key in ("data", "size", "held_out") if told is None or key != "data"}


def _chain(card: Any, command: str, arguments: list[str]) -> Mapping[str, Any]:
    """The chain of a saved model; with another scheduler, told or brought by adapters, that of its pipeline with it."""
    from rlfusion.models import pipelines

    told = _named(arguments)
    if not card.pipeline or not (told.scheduler or pipelines.brings(told.adapters, _file(arguments))):
        return card.chain
    settings = replace(told, variant=card.pipeline["variant"], family=card.pipeline.get("family", ""))
    return card.chain | pipelines.defaults(card.pipeline["name"], command in TRAINING, settings, _file(arguments))


def _named(arguments: list[str]) -> Any:
    """What the arguments say of which pipeline it is, as its settings."""
    from rlfusion.models import pipelines

    keys = ("variant", "family", "adapters", "scheduler")
    return pipelines.Settings(**{key: str(told_last(arguments, "pipeline", key) or "") for key in keys})


def _file(arguments: list[str]) -> str:
    """The file of adapters that are trained on; "" for none."""
    from rlfusion.models import lora

    settings = lora.parse(str(told_last(arguments, "lora") or ""))
    return settings.file if settings else ""


def _sizes(command: str, arguments: list[str], about: Mapping[str, Any]) -> dict[str, Any]:
    """The samples of a call that suit a pipeline, of which a card keeps ``about``, and the device's memory
    (``models.pipelines.sizes``); a saved one has its own ``pipeline.decode``.
    """
    from rlfusion.models.pipelines import sizes
    from rlfusion.training.devices import memory_of

    if command not in ROLLING:
        return {}
    fit, device = sizes.CPU, str(told_last(arguments, "device") or "auto")
    memory = memory_of("cuda") if device == "auto" or device.startswith("cuda") else 0
    if memory:
        told = {key: told_last(arguments, "pipeline", key) for key in ("size", "dtype", "checkpointing")}
        network = sizes.network(about, told, bool(told_last(arguments, "lora")))
        fit = sizes.fitting(network, memory) if network.parameters else fit  # of one that is not known nothing follows
    update = "agent.micro_batch" if command == "finetune" else "micro_batch"
    own = {} if "decode" in about or not memory else {"pipeline.decode": fit.decode}
    return {"rollout.item": fit.item, update: fit.micro_batch, **own}


def _of_agent(arguments: list[str]) -> dict[str, Any]:
    """The defaults that an agent has of its own, and of its rollouts, where the model is a pretrained pipeline."""
    from rlfusion.agents import AGENTS

    name, told = told_last(arguments, "agent", "name"), {}
    agent = spec.lookup(AGENTS, "ddpo" if name is None else str(name), "agent")
    for choice in CHOICES:
        told[choice] = told_last(arguments, "agent", choice)
    told["lora"] = told_last(arguments, "lora")
    own = agent.for_pipelines(told)
    return {key if "." in key else f"agent.{key}": value for key, value in own.items()}


def for_pipelines(text: str, lora: str = "") -> str:
    """An agent as a comparison has it, ``ddpo`` or ``high = ddpo(lr=0.01)``, with its own defaults of pretrained
    pipelines written down where it says nothing else, under the name that it had. Its rollouts are those of all.
    """
    from rlfusion.agents import AGENTS
    from rlfusion.config.compare import shown, written

    name, told = spec.split(written(text))
    own = spec.lookup(AGENTS, name, "agent").for_pipelines({**told, "lora": lora})
    own = {key: value for key, value in own.items() if "." not in key}
    if not set(own) - set(told):
        return text
    whole = f"{name}({', '.join(f'{key}={value!r}' for key, value in {**own, **told}.items())})"
    return f"{shown(text).replace(' = ', '=')} = {whole}"


def is_pipeline(name: str) -> bool:
    """Whether a model is a pretrained pipeline, or was made of one."""
    from rlfusion import models
    from rlfusion.models import pipelines

    return bool(name) and (pipelines.is_pipeline(name) or bool(models.load_card(Path(name)).pipeline))


def _fitting(there: int) -> dict[str, Any]:
    """The default of rollout.prompts where there are fewer prompts than that."""
    from rlfusion.config import Rollout

    return {"rollout.prompts": there} if 1 < there < Rollout().prompts else {}


def _prompts(arguments: list[str], own: int) -> int:
    """How many prompts a pipeline is given, ``own`` where none are."""
    from rlfusion.models import pipelines

    told = told_last(arguments, "pipeline", "prompts")
    if not told:
        return own
    how = [str(told_last(arguments, "pipeline", key) or "") for key in ("prompt_column", "encoding")]
    return len(pipelines.read_prompts(str(told), "", *how).texts)


def _classes(arguments: list[str]) -> int:
    """How many classes, or captions, the data have that a base model is trained on here."""
    from rlfusion.data import load as load_data

    data, size = (told_last(arguments, "pretrain", key) for key in ("data", "size"))
    return load_data(str(data), int(size or 32)).classes if data else 0


def preset_defaults(objective: str, prefix: str) -> dict[str, Any]:
    """The settings of a pretraining preset, as defaults by dotted key: a preset is shorthand, not a setting."""
    from rlfusion.pretrain import PRESETS, losses

    if objective not in PRESETS:
        try:
            losses.make(absolute(objective))
        except ConfigError as error:
            raise error if "(" in objective or ":" in objective else unknown("objective", objective, PRESETS) from error
        return {f"{prefix}train.loss": absolute(objective)}
    return {key if key.startswith("chain.") else prefix + key: value for key, value in PRESETS[objective].items()}
