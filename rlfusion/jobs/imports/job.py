"""A file of another program's settings as a file of ours."""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlfusion.agents import AGENTS
from rlfusion.common.errors import ConfigError, unknown
from rlfusion.config import Finetune
from rlfusion.config.imports import ImportConfig
from rlfusion.jobs.imports import reading
from rlfusion.jobs.imports.ddpo_pytorch import DDPO_PYTORCH
from rlfusion.jobs.imports.table import Program, nested
from rlfusion.jobs.imports.trl import TRL_ALIGNPROP, TRL_DDPO

CLASSES = {"DDPOConfig": TRL_DDPO, "AlignPropConfig": TRL_ALIGNPROP}
PROGRAMS = {
    "trl": tuple(CLASSES.values()),
    "trl-ddpo": (TRL_DDPO,),
    "trl-alignprop": (TRL_ALIGNPROP,),
    "ddpo-pytorch": (DDPO_PYTORCH,),
}
"""By the name that ``import-config`` takes: the programs that a file may be of."""


class Imported(NamedTuple):
    """Settings of ours, group by group; what is to be said of them; and what a run needs beside."""

    settings: dict[str, Any]
    said: list[str]
    missing: list[str]


def table_of(name: str) -> str:
    """The table of a program of ``PROGRAMS``, as Markdown."""
    return "\n\n".join(program.table() for program in PROGRAMS[name])


def imported(name: str, file: str) -> Imported:
    """The settings in ``file``, of the program ``name``.

    Raises:
        ConfigError: no such program, a file that cannot be read, an unknown setting (the nearest is named), or values
            that one cannot have.
    """
    if name not in PROGRAMS:
        raise unknown("program", name, PROGRAMS)
    program, given = _given(PROGRAMS[name], file)
    complete = program.complete(given)
    made, said = program.mapped(complete)
    without = [row for row in program.rows if not row.ours and row.name in given and given[row.name] != row.default]
    said = [*(f"{row.name} has no counterpart: {row.why}" for row in without), *said]
    missing = [line for line in program.missing if line.partition(":")[0] not in made]
    return Imported(nested(made), list(dict.fromkeys(said)), missing)


def import_config(settings: ImportConfig) -> tuple[str, Imported]:
    """The text of the file of ours, with what is to be said as its comments."""
    found = imported(settings.program, settings.file)
    _require_accepted(found.settings)
    notes = [f"of {settings.program}, by rlfusion import-config (docs/migration.md)"]
    notes += [f"missing: {line}" for line in found.missing] + found.said
    head = "".join(f"# {' '.join(line.split())}\n" for line in notes)
    return head + yaml.safe_dump(found.settings, sort_keys=False, allow_unicode=True), found


def _require_accepted(settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: finetune would refuse a value.
    """
    usual, held = Finetune(), {}
    for name, value in settings.items():
        if name == "agent":
            held[name] = AGENTS.find(value["name"]).object(**{k: v for k, v in value.items() if k != "name"})
        else:
            held[name] = replace(getattr(usual, name), **value) if is_dataclass(getattr(usual, name)) else value
    Finetune(**held)


def _given(programs: tuple[Program, ...], file: str) -> tuple[Program, dict[str, Any]]:
    """The program that a file is of, and what it says, by dotted name."""
    place, _, function = file.partition(".py:") if ".py:" in file else (file, "", "")
    path = Path(f"{place}.py" if function else file)
    if DDPO_PYTORCH in programs:
        if path.suffix.lower() == ".py":
            return DDPO_PYTORCH, _flat(DDPO_PYTORCH, reading.collection(path, function or "get_config"))
        return DDPO_PYTORCH, _flat(DDPO_PYTORCH, _plain(path))
    if path.suffix.lower() == ".py":
        named, given = reading.call(path, {n: p for n, p in CLASSES.items() if p in programs})
        return CLASSES[named], given
    given = _plain(path)
    program = programs[0] if len(programs) == 1 else _told_apart(path, given)
    return program, _flat(program, given)


def _plain(path: Path) -> dict[str, Any]:
    if path.suffix.lower() in (".sh", ".txt"):
        return dict(reading.words(path))
    return reading.mapping(path)


def _told_apart(path: Path, given: Mapping[str, Any]) -> Program:
    """Which of TRL's two trainers a file is for, by the settings that the other has not.

    Raises:
        ConfigError: nothing says so, or both.
    """
    for name in given:
        if name not in (known := {**TRL_DDPO.known, **TRL_ALIGNPROP.known}):
            raise unknown("setting of TRL's DDPOConfig or AlignPropConfig", name, known)
    ddpo = [name for name in given if name in TRL_DDPO.known and name not in TRL_ALIGNPROP.known]
    alignprop = [name for name in given if name in TRL_ALIGNPROP.known and name not in TRL_DDPO.known]
    if bool(ddpo) == bool(alignprop):
        both = f"{ddpo[0]} is of DDPO and {alignprop[0]} of AlignProp" if ddpo else "both have all of its settings"
        raise ConfigError(f"{str(path)!r}: {both}: expected import-config trl-ddpo, or trl-alignprop")
    return TRL_DDPO if ddpo else TRL_ALIGNPROP


def _flat(program: Program, held: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups as dotted names; a setting that is a mapping stays one, unless its members are settings, too."""
    found: dict[str, Any] = {}
    for name, value in held.items():
        dotted = f"{prefix}{name}"
        grouped = any(known.startswith(f"{dotted}.") for known in program.known)
        if isinstance(value, Mapping) and (grouped or dotted not in program.known):
            found |= _flat(program, value, f"{dotted}.") or {dotted: value}
        else:
            found[dotted] = value
    return found
