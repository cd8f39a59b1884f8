"""Settings that a comparison varies, ``{"agent.lr": [0.0001, 0.0003]}``: every agent meets every combination of values.

A value is held to the setting's own annotation and limits, agent by agent, before anything runs.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import product
from typing import Any, get_type_hints

from rlfusion.common.annotations import fits, refused, shown
from rlfusion.common.code_files import absolute, label
from rlfusion.common.errors import ConfigError, shorten, unknown

Vary = Mapping[str, list[Any]]
"""The values of each setting, by the dotted name that it has in a fine-tuning."""

ELSEWHERE = (
    (r"agent|agent\.name|agents", "--agents varies it"),
    (r"rewards?|reward_options(\..*)?", "--rewards varies it"),
    (r"seeds?", "--seeds says how many there are"),
    (r"budget_queries|updates|checkpoint_every", "it follows from the budget, which is the same for all"),
    (r"(base|pretrain|pipeline)(\..*)?", "all runs of a comparison start from one base model"),
    (r"evaluation(\..*)?|monitor\.every", "all runs of a comparison are evaluated alike"),
    (r"root|name", "it says where the comparison is"),
    (r"learner(\..*)?", "each run of a comparison learns in one process"),
)
"""Settings that no ``--vary`` takes, as a pattern of their name, and why."""


def placed(vary: Vary) -> dict[str, list[Any]]:
    """The same, files in it with their paths from the root.

    Raises:
        ConfigError: a setting that cannot be varied, none or equal values, or a value that cannot be told from another.
    """
    held = {}
    for name, values in vary.items():
        for pattern, why in ELSEWHERE:
            if re.fullmatch(pattern, name):
                raise ConfigError(f"vary {shorten(name)}: {why}; expected another setting, such as agent.lr")
        held[name] = [absolute(value) if isinstance(value, str) else value for value in values]
        told = [_told(value) for value in held[name]]
        if not told or len(set(told)) < len(told):
            raise ConfigError(f"vary {shorten(name)} = {shorten(values)}: expected one value at least, and each once")
    return held


def combinations(vary: Vary) -> list[dict[str, Any]]:
    """Every combination of values; one without any where nothing is varied."""
    return [dict(zip(vary, values)) for values in product(*vary.values())]


def title(varied: Mapping[str, Any]) -> str:
    """A combination in words: ``lr=0.0001 clip=0.2``, by whole names where two end alike."""
    ends = [name.rpartition(".")[2] for name in varied]
    short = len(set(ends)) == len(ends)
    return " ".join(f"{end if short else name}={_told(varied[name])}" for end, name in zip(ends, varied))


def _told(value: Any) -> str:
    """A value as a row shows it: YAML's words, and of a text that names a thing in a file no place."""
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    name, bracket, settings = value.partition("(")
    return (f"{label(name)}{bracket}{settings}" if value.strip() else shown(value)).strip()


def changed(kind: type, parts: Mapping[str, Any], varied: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """What a dataclass ``kind`` of settings is made of, ``parts``, with other values of settings by dotted name.

    Args:
        of: whose settings its ``agent`` holds, for errors.

    Raises:
        ConfigError: no such setting, or a value that does not fit.
    """
    below: dict[str, dict[str, Any]] = {}
    new = dict(parts)
    for name, value in varied.items():
        first, _, rest = name.partition(".")
        if rest and is_dataclass(new.get(first)):
            below.setdefault(first, {})[rest] = value
            continue
        annotation = None if rest else get_type_hints(kind).get(first)
        if annotation is None or is_dataclass(new.get(first)):
            raise _unknown(name, _leaves(parts))
        new[first] = _fitting(name, value, annotation, "")
    return new | {first: _replaced(parts[first], values, first, of) for first, values in below.items()}


def _replaced(part: Any, values: Mapping[str, Any], prefix: str, of: str) -> Any:
    """A dataclass with other values of its settings, all at once, as some go only with others."""
    held = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
    whose = of if prefix == "agent" else ""
    for name in values:
        if name not in _leaves(held):
            raise unknown(f"setting of {whose or prefix} to vary", name, _leaves(held))
    hints = get_type_hints(type(part))
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            held[first] = _fitting(f"{prefix}.{first}", value, hints[first], whose)
    held |= {first: _replaced(held[first], below, f"{prefix}.{first}", "") for first, below in inner.items()}
    try:
        return type(part)(**held)
    except ConfigError as error:
        own = not whose and str(error).partition(" = ")[0] in held
        raise ConfigError(f"vary {prefix}.{error}" if own else f"vary {whose or prefix}: {error}") from error


def _unknown(name: str, known: list[str]) -> ConfigError:
    """The error about a setting that does not exist; one that ends so is meant where it is but the end of a name."""
    meant = [one for one in known if one.endswith(f".{name}") and not one.startswith("pretrain.")]
    if meant:
        return ConfigError(
            f"unknown setting to vary {shorten(repr(name))}; did you mean {' or '.join(map(repr, meant))}?"
        )
    return unknown("setting to vary", name, known)


def _fitting(name: str, value: Any, annotation: Any, of: str) -> Any:
    if not fits(value, annotation):
        raise ConfigError(f"vary {refused(name, value, annotation, of)}")
    return tuple(value) if isinstance(value, list) and "tuple" in str(annotation) else value


def _leaves(parts: Mapping[str, Any]) -> list[str]:
    """The dotted names of the settings that have no parts of their own."""
    found = []
    for name, held in parts.items():
        below = {f.name: getattr(held, f.name) for f in fields(held)} if is_dataclass(held) else {}
        found += [f"{name}.{one}" for one in _leaves(below)] if below else [name]
    return found
