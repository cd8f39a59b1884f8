"""The settings of a command from its arguments and its configuration files: jsonargparse, and what it does not do.

What an agent, a method, a preset or a model's own chain changes of the defaults is found before the arguments are read.
"""

import difflib
import json
import re
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlfusion.errors import ConfigError, unknown

PRESET_PREFIX = {"pretrain": "", "finetune": "pretrain.", "compare": "pretrain.", "distill": "pretrain."}
"""The commands that take --objective, and where they keep the settings of pretraining."""

PIPELINE_DEFAULTS = {
    "finetune": {"evaluation.samples": 64, "monitor.samples": 64, "rollout.item": 8, "agent.micro_batch": 8},
    "compare": {"evaluation.samples": 64, "rollout.item": 8, "micro_batch": 8},
    "sample": {"count": 8, "scale": 1},
    "evaluate": {"evaluation.samples": 64},
    "check-model": {},
}
"""Defaults of the commands where the model is a pretrained pipeline."""

OBJECTIVE = "a pretraining recipe by name (docs/pretraining.md): sets model, train.loss and chain"

RESUMABLE = ("finetune", "compare", "pretrain", "pretrain-autoencoder", "distill", "train-clip")
RESUMING = "--resume FOLDER, and nothing else, goes on with a stopped or killed run."


def settings_of(kind: str, arguments: list[str]) -> Any:
    """The settings of a job; those of an agent or a method are of the algorithm that ``--agent`` or ``--method`` names.
    The chain of a fine-tuning or a comparison is that of the model of ``--base``, unless told otherwise.
    """
    from rlfusion import config
    from rlfusion.autoencoding import Autoencode
    from rlfusion.comparison import Compare
    from rlfusion.contrastive import TrainClip

    plain = {"pretrain": config.Pretrain, "pretrain-autoencoder": Autoencode, "train-clip": TrainClip}
    if kind in plain:
        return parse(plain[kind], kind, arguments)
    if kind == "distill":
        arguments = _long(arguments, "method")
        typed = config.with_method(str(_told(arguments, "method", "name") or "cd"))
        return parse(typed, kind, arguments, make=config.Distill)
    arguments = [re.sub(r"^--model(=|$)", r"--base\1", argument) for argument in arguments]
    if kind == "compare":
        return parse(Compare, kind, _listed(arguments), model_defaults("compare", arguments, "base"))
    arguments = _long(arguments, "agent")
    typed = config.with_agent(str(_told(arguments, "agent", "name") or "ddpo"))
    return parse(typed, kind, arguments, model_defaults("finetune", arguments, "base"), make=config.Finetune)


def _long(arguments: list[str], what: str) -> list[str]:
    """``--agent NAME`` as ``--agent.name NAME``; a mapping or a file of settings after ``--agent`` stays."""
    option = f"--{what}"
    values = [a.partition("=")[2] if "=" in a else following for a, following in pairwise([*arguments, ""])]
    named = [re.fullmatch(rf"{option}(=.*)?", a) and re.fullmatch(r"\w+", value) for a, value in zip(arguments, values)]
    return [a.replace(option, f"{option}.name", 1) if short else a for a, short in zip(arguments, named)]


def _listed(arguments: list[str]) -> list[str]:
    """``--agents a,b(c=1,d=2)`` and ``--rewards`` as the YAML lists that they stand for."""
    out, last = [], ""
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else (last, "", argument)
        if option in ("--agents", "--rewards") and value and not value.startswith("["):
            parts = [part.strip() for part in re.split(r",(?![^(]*\))", value)]
            value = json.dumps(parts)
            argument = f"{option}={value}" if equals else value
        last = argument if argument.startswith("--") and not equals else ""
        out.append(argument)
    return out


def _told(arguments: list[str], *key: str) -> Any:
    """The value that the arguments, or the configuration files among them, give a setting last; None for none."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    told = None
    for option, value in pairwise(words):
        if option == f"--{'.'.join(key)}":
            told = value
        elif option == "--config" and Path(value).is_file():
            held = _settings_in(Path(value))
            for name in key:
                held = held.get(name) if isinstance(held, dict) else None
            told = told if held is None else held
    return told


def _settings_in(file: Path) -> dict[str, Any]:
    """The content of a configuration file.

    Raises:
        ConfigError: it cannot be read, is no YAML (the line is named), or holds no settings by name.
    """
    import yaml

    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        at = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"--config {str(file)!r} is no YAML: {error.problem or error.context}{at}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"--config {str(file)!r} cannot be read: {said}") from error
    if held is not None and not isinstance(held, dict):
        raise ConfigError(f"--config {str(file)!r} holds {type(held).__name__}: expected settings, name: value")
    return held or {}


def resumed(kind: str, arguments: list[str]) -> tuple[Any, Path]:
    """The settings of the run that ``--resume FOLDER`` names, and its folder.

    Raises:
        ConfigError: something beside it, or no folder of a run.
    """
    words = [*arguments[0].split("=", 1), *arguments[1:]]
    if len(words) != 2 or words[0] != "--resume":
        raise ConfigError("--resume takes the run's folder and nothing else: its settings are those of its config.yaml")
    folder = Path(words[1])
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"--resume {str(folder)!r}: expected the folder of a run, with config.yaml")
    settings = settings_of(kind, ["--config", str(folder / "config.yaml")])
    return replace(settings, root=str(folder.parent)), folder


def model_defaults(command: str, arguments: list[str], option: str) -> dict[str, Any]:
    """The chain that the model of an option was made with, as defaults, and of a pretrained pipeline numbers that suit
    its size; none for no model.
    """
    from rlfusion import models, pipelines

    name = _told(arguments, option)
    if not name:
        return {}
    if pipelines.is_pipeline(name):
        variant = str(_told(arguments, "pipeline", "variant") or "")
        training = command in ("finetune", "compare", "check-model")
        chain, few = pipelines.defaults(name, training, variant), PIPELINE_DEFAULTS[command]
    else:
        card = models.load_card(Path(name))
        chain, few = card.chain, PIPELINE_DEFAULTS[command] if card.pipeline else {}
    return few | {f"chain.{key}": value for key, value in chain.items()}


def parse(
    settings: type,
    command: str,
    arguments: list[str],
    defaults: Mapping[str, Any] | None = None,
    make: type | None = None,
) -> Any:
    """The settings dataclass of a command from its arguments and ``--config`` files; ``defaults`` by dotted key.
    ``make`` is the class of the result where it is not ``settings``.

    Raises:
        ConfigError: an unknown key or an unusable value, in one line.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

    parser = ArgumentParser(
        prog=f"rlfusion {command}",
        description=settings.__doc__.splitlines()[0],
        epilog=RESUMING if command in RESUMABLE else None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="a YAML file of settings, such as a run's config.yaml"
    )
    parser.add_class_arguments(settings, as_group=False)
    parser.set_defaults(dict(defaults or {}))
    if command in PRESET_PREFIX:
        parser.add_argument("--objective", default="", help=OBJECTIVE)
    keys = [action.dest for action in parser._actions]
    try:
        given = parser.parse_args(arguments)
        if given.get("objective"):
            preset = _preset(given.objective, PRESET_PREFIX[command])
            own = "chain." if command == "distill" else "-"  # a student's chain is not its teacher's
            parser.set_defaults({key: value for key, value in preset.items() if not key.startswith(own)})
            given = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), keys)) from error
    for group in sorted({key.rpartition(".")[0] for key in keys} - {""}):
        if not isinstance(given[group], Namespace):
            raise ConfigError(f"{group} = {given[group]!r}: expected a mapping of settings")
    try:
        values = vars(parser.instantiate(given))
        values.pop("config")
        values.pop("objective", None)
        return (make or settings)(**values)
    except ConfigError as error:
        raise ConfigError(_located(str(error), given.items())) from error


def _preset(objective: str, prefix: str) -> dict[str, Any]:
    """The settings of a pretraining preset, as defaults by dotted key: a preset is shorthand, not a setting."""
    from rlfusion.pretrain import PRESETS

    if objective not in PRESETS:
        raise unknown("objective", objective, PRESETS)
    return {key if key.startswith("chain.") else prefix + key: value for key, value in PRESETS[objective].items()}


def _located(text: str, given: Iterable[tuple[str, Any]]) -> str:
    """A dataclass's own "name = value: ..." with the whole dotted key, where one setting alone fits."""
    said = re.match(r"(\w+) = (.*?): ", text)
    fits = [key for key, value in given if said and [key.rpartition(".")[2], str(value)] == list(said.groups())]
    return fits[0].removesuffix(said[1]) + text if said and len(fits) == 1 else text


TYPE_NAMES = re.compile(r"typing\.|<class '|'>")


def _explain(text: str, keys: list[str]) -> str:
    """jsonargparse's message with the nearest key, where a key is unknown."""
    wrong = re.match(r'Parser key "([\w.]+)":\s*Expected an? (.*)\. Got value: (.*)', text, re.DOTALL)
    if wrong:
        key, expected, value = wrong.groups()
        return f"{key} = {value}: expected {TYPE_NAMES.sub('', expected)}"
    inside = re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    found = re.search(r"[Uu]nrecognized arguments: *-*([\w.]+)|(?:Key|Option) ['\"]?([\w.]+)['\"]? is not", text)
    if not found and not inside:
        return text
    key = ".".join(inside.groups()) if inside else found.group(1) or found.group(2)
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    return f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
