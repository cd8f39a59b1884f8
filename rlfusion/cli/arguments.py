"""The settings of a command from its arguments and its configuration files.

``words`` says which words are options, ``settings_tree`` which settings there are, ``annotations`` what each may be;
jsonargparse makes the objects, --help and --print_config. What an agent, a method, a preset or a model's own chain
changes of the defaults is found before.
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlfusion.cli import words
from rlfusion.cli.defaults import (
    data_defaults,
    for_pipelines,
    is_pipeline,
    mapping_of,
    model_defaults,
    preset_defaults,
    told_last,
)
from rlfusion.cli.located import located
from rlfusion.cli.settings_text import load
from rlfusion.cli.settings_tree import Tree, tree
from rlfusion.cli.unknown_settings import unknown_setting
from rlfusion.cli.values import checked, read
from rlfusion.cli.varied import varied
from rlfusion.cli.words import RESUMABLE
from rlfusion.common.code_files import absolute, pinned
from rlfusion.common.errors import ConfigError, shorten
from rlfusion.common.registry import Registry

PRESET_PREFIX = {"pretrain": "", "finetune": "pretrain.", "compare": "pretrain.", "distill": "pretrain."}
"""The commands that take --objective, and where they keep the settings of pretraining."""

OBJECTIVE = "a pretraining recipe by name (docs/pretraining.md): sets model, train.loss and chain; or a loss alone"

RESUMING = (
    "--resume FOLDER goes on with a stopped or killed run; beside it only --change KEY=VALUE, for what is meant. "
    "--quiet says errors and the last line alone, --json the summary alone, as one line of JSON on standard output."
)

EARLIER = (
    " Runs that are there: rlfusion compare RUN... [--by SETTING,...] [--out FOLDER] makes report.html of them "
    "(docs/comparing.md)."
)


def settings_of(kind: str, arguments: list[str]) -> Any:
    """The settings of a job; those of an agent or a method are of the algorithm that ``--agent`` or ``--method`` names.
    The chain of a fine-tuning or a comparison is that of the model of ``--base``, unless told otherwise.
    """
    from rlfusion import config, distill
    from rlfusion.agents import AGENTS
    from rlfusion.config import Autoencode, Compare, TrainClip

    plain = {"pretrain": config.Pretrain, "pretrain-autoencoder": Autoencode, "train-clip": TrainClip}
    if kind in plain:
        return parse(plain[kind], kind, arguments)
    typical = {"distill": lambda: config.with_method("cd"), "compare": lambda: Compare}
    if kind == "compare":
        arguments = varied(arguments)
    known = tree(typical.get(kind, lambda: config.with_agent("ddpo"))())
    arguments = _whole(arguments, known)
    words.read(kind, arguments, known.names(), known.leaves)  # what is no option is said before anything is read
    if kind == "distill":
        arguments = _long(arguments, "method", distill.METHODS)
        method = told_last(arguments, "method", "name")
        typed = config.with_method("cd" if method is None else str(method))
        return parse(typed, kind, arguments, data_defaults(kind, arguments, "teacher"), config.Distill)
    arguments = [re.sub(r"^--model(=|$)", r"--base\1", argument) for argument in arguments]
    if kind == "compare":
        made = parse(Compare, kind, arguments, model="base")
        if not is_pipeline(made.base):
            return made
        lora = made.lora or next(filter(None, made.vary.get("lora", [])), "")
        return replace(made, agents=[for_pipelines(text, lora) for text in made.agents])
    arguments = _long(arguments, "agent", AGENTS)
    agent = told_last(arguments, "agent", "name")
    typed = config.with_agent("ddpo" if agent is None else str(agent))
    return parse(typed, "finetune", arguments, make=config.Finetune, model="base")


def _long(arguments: list[str], what: str, table: Registry) -> list[str]:
    """``--agent NAME``, in any case, as ``--agent.name NAME``; a mapping or a file of settings after it stays."""
    out, known = [], {name.lower(): name for name in table.names()}
    for argument in arguments:
        before = out[-1] if out else ""
        if before == f"--{what}" and _is_name(argument):
            out[-1], argument = f"--{what}.name", known.get(argument.strip().lower(), absolute(argument))
        elif argument.startswith(f"--{what}=") and _is_name(argument.partition("=")[2]):
            name = argument.partition("=")[2]
            argument = f"--{what}.name={known.get(name.strip().lower(), absolute(name))}"
        out.append(argument)
    return out


def _whole(arguments: list[str], known: Tree) -> list[str]:
    """Arguments with ``--adapters`` as the setting of pipelines that it is."""
    if "pipeline.adapters" not in known.leaves:
        return arguments
    return [re.sub(r"^--adapters(=|$)", r"--pipeline.adapters\1", argument) for argument in arguments]


def _is_name(text: str) -> bool:
    return re.fullmatch(r"\s*[\w-]*\s*|[^{}\n]+:\s*\w+\s*", text) is not None and not text.startswith("--")


def resumed(kind: str, arguments: list[str], check: Callable[[Any], Any]) -> tuple[Any, Path]:
    """The settings with which the run of ``--resume FOLDER [--change KEY=VALUE ...]`` goes on, and its folder.
    ``check`` refuses changes that cannot work.

    Raises:
        ConfigError: something beside them, no folder of a run, settings that are no longer the run's, or a bad change.
    """
    from rlfusion.jobs import resuming

    folder, changes = resuming.asked(arguments)

    def workable(settings: Any) -> None:
        with pinned(asdict(settings)):
            check(replace(settings, root=str(folder.parent)))

    settings = resuming.settings_of_run(kind, folder, changes, partial(settings_of, kind), workable)
    return replace(settings, root=str(folder.parent)), folder


def parse(
    settings: type,
    command: str,
    arguments: list[str],
    defaults: Mapping[str, Any] | None = None,
    make: type | None = None,
    model: str = "",
) -> Any:
    """The settings dataclass of a command from its arguments and ``--config`` files; ``defaults`` by dotted key.
    ``make`` is the class of the result where it is not ``settings``; ``model`` the option whose model has defaults.

    Raises:
        ConfigError: an unknown key or an unusable value, in one line.
    """
    known = tree(settings, ("objective",) if command in PRESET_PREFIX else ())
    arguments = _whole(arguments, known)
    given = list(_given(settings, command, arguments, known))
    flags = [f for f in arguments if f in words.FLAGS or f.startswith("--print_config=")]
    values = dict(given)
    if not flags:
        _require(settings, command, values)
    told = dict(defaults or {}) | (model_defaults(command, arguments, model) if model else {})
    told = {key: value for key, value in told.items() if key in known.leaves}
    if preset := values.pop("objective", ""):
        own = "chain." if command == "distill" else "-"  # a student's chain is not its teacher's
        found = preset_defaults(preset, PRESET_PREFIX[command])
        told |= {key: value for key, value in found.items() if not key.startswith(own)}
    parser = make_parser(settings, command, told)
    try:
        read = parser.parse_args([f"--{key}={text}" for key, text in given if key != "objective"] + flags)
    except (ArgumentError, TypeError) as error:
        raise ConfigError(shorten(error, 250)) from error
    try:
        made = vars(parser.instantiate(read))
        return (make or settings)(**{f.name: made[f.name] for f in fields(settings)})
    except ConfigError as error:
        raise ConfigError(located(str(error), settings, read.items())) from error


def make_parser(settings: type, command: str, defaults: Mapping[str, Any]) -> Any:
    """jsonargparse's parser of a settings class."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog=f"rlfusion {command}",
        usage=f"rlfusion {command} [--SETTING VALUE]...",  # of the hundred settings that stand below
        description=settings.__doc__.splitlines()[0],
        epilog=f"{RESUMING}{EARLIER if command == 'compare' else ''}" if command in RESUMABLE else None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="a YAML file of settings, such as a run's config.yaml"
    )
    parser.add_class_arguments(settings, as_group=False)
    parser.set_defaults(dict(defaults))
    if command in PRESET_PREFIX:
        parser.add_argument("--objective", default="", help=OBJECTIVE)
    return parser


def _require(settings: type, command: str, given: Mapping[str, str]) -> None:
    """Refuse a command without what it cannot do without."""
    for field in fields(settings):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given:
            raise ConfigError(f"rlfusion {command} needs --{field.name}: expected --{field.name} VALUE (see --help)")


def _given(settings: type, command: str, arguments: list[str], known: Tree) -> Iterator[tuple[str, str]]:
    """The settings of the arguments and of the files among them, in order, each checked, as text for jsonargparse."""
    typed: dict[str, str] = {}
    mappings: dict[str, dict[str, Any]] = {}
    chosen = next((f"{n} {_default_name(settings, n)!r}" for n in ("agent", "method") if n in known.groups), "")
    for option, text in words.read(command, arguments, known.names(), known.leaves):
        if option.startswith("-"):
            continue
        if text is None:
            raise _no_value(option, command, known, chosen)
        if typed.get(option, text) != text:
            twice = f"as {shorten(repr(typed[option]))} and as {shorten(repr(text))}"
            print(f"rlfusion: note: --{shorten(option)} is given twice, {twice}: the last holds", file=sys.stderr)
        if option != "config":
            typed[option] = text
        for key, value in _unfolded(option, text, known):
            holder = known.holder(key)
            if key not in known.leaves and not holder:
                raise unknown_setting(key, command, known, chosen)
            if holder:
                key, value = holder, _with(mappings.get(holder, {}), key.removeprefix(f"{holder}.").split("."), value)
            if isinstance(value, dict):
                mappings[key] = value
            yield key, checked(key, value, known)


def _with(held: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A mapping with one value more, ``path`` below it."""
    name, *rest = path
    inner = held.get(name)
    return {**held, name: _with(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def _no_value(option: str, command: str, known: Tree, chosen: str) -> ConfigError:
    """The error about an option without a value, or about one that does not exist."""
    if option != "config" and option not in known.names() and not known.holder(option):
        return unknown_setting(option, command, known, chosen)
    value = "true" if known.leaves.get(option) is bool else "VALUE"
    return ConfigError(f"--{option} has no value: expected --{option} {value}")


def _default_name(settings: type, group: str) -> str:
    (held,) = (field.type for field in fields(settings) if field.name == group)
    return str(getattr(held, "name", group))


def _unfolded(option: str, text: str, known: Tree) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each setting that an option and its text give."""
    if option == "config":
        yield from _leaves(mapping_of(option, text), "", known)
    elif option in known.groups:
        yield from _leaves(mapping_of(option, text), f"{option}.", known)
    elif option in known.leaves:
        yield option, read(option, text, known.leaves[option])
    else:
        yield option, load(text, f"--{option}") if known.holder(option) else text


def _leaves(held: Mapping[Any, Any], prefix: str, known: Tree) -> Iterator[tuple[str, Any]]:
    for name, value in held.items():
        key = f"{prefix}{name}"
        if key in known.groups and not isinstance(value, dict):
            raise ConfigError(
                f"{key} = {'null' if value is None else shorten(repr(value))}: expected a mapping of settings"
            )
        if isinstance(value, dict) and value and key not in known.leaves and not known.holder(key):
            yield from _leaves(value, f"{key}.", known)
        elif key not in known.groups:
            yield key, value
