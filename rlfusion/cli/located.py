"""Whose setting an error is about: a record of settings names its own fields, the command line whole dotted keys."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from rlfusion.common.errors import ConfigError


def located(text: str, settings: type, given: Iterable[tuple[str, Any]]) -> str:
    """A record's own "name = value: ..." with the whole dotted key among the values that are ``given``. Where several
    fit, it is that of the first group of ``settings`` that says so by itself.
    """
    match = re.match(r"(\w+) = (.*?): ", text)
    if not match:
        return text
    name, values = match[1], dict(given)
    fits = [key for key, value in values.items() if [key.rpartition(".")[2], str(value)] == list(match.groups())]
    if len(fits) > 1:
        refused = [f"{prefix}{name}" for prefix, why in _refusals(settings, values) if why == text]
        fits = [key for key in refused if key in fits]
    return f"{fits[0].removesuffix(name)}{text}" if fits else text


def _refusals(settings: type, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The innermost groups that cannot be made of their values, and why: (what their keys begin with, the error)."""
    found: list[tuple[str, str]] = []

    def made(group: type, prefix: str) -> Any:
        """The group, or None where it or a part of it is refused."""
        hints, parts, before = get_type_hints(group), {}, len(found)
        for name in (field.name for field in fields(group) if field.init):
            inner = is_dataclass(hints[name])
            parts[name] = made(hints[name], f"{prefix}{name}.") if inner else values.get(f"{prefix}{name}")
        try:
            return group(**parts) if len(found) == before else None
        except ConfigError as error:
            found.append((prefix, str(error)))
            return None

    made(settings, "")
    return found
