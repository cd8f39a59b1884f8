"""Settings of strangers that are chosen by name: a dataclass of theirs, with the name that finds it as a setting."""

import inspect
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal, get_type_hints

from rlfusion.common.errors import ConfigError
from rlfusion.common.registry import members


def named_settings(what: str, protocol: type, defaults: tuple[type, ...], held: Any, name: str) -> type:
    """The dataclass ``held`` with a setting more, ``name``, which is written down with the others.

    What ``protocol`` asks for and ``held`` lacks is taken from ``defaults``.

    Raises:
        ConfigError: it is no frozen dataclass, a setting has no default, or a method is missing.
    """
    named, expected = f"{what} {name!r}", f"a frozen dataclass of settings, {protocol.__module__}.{protocol.__name__}"
    if not inspect.isclass(held) or not is_dataclass(held):
        raise ConfigError(f"{named} is {_described(held)}: expected {expected} (docs/doors.md)")
    if not held.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ConfigError(f"{named} can be changed: expected {expected}, under @dataclass(frozen=True)")
    for one in fields(held):
        if one.default is MISSING and one.default_factory is MISSING and one.name != "name":
            raise ConfigError(f"{named}: its setting {one.name!r} has no default, expected one")
    there = {"name", *(name for base in (held, *defaults) for name in dir(base))}
    lacking = [one for one in members(protocol) if one not in there]
    if lacking:
        raise ConfigError(f"{named} is without {', '.join(lacking)}: expected {expected} (docs/doors.md)")
    return _made(held, defaults, name)


@lru_cache
def _made(held: type, defaults: tuple[type, ...], name: str) -> type:
    """The class, as a part of this module, where libraries that import a class by its name find it."""
    hints, own = get_type_hints(held), [one for one in fields(held) if one.name != "name"]
    values = {
        one.name: one.default if one.default_factory is MISSING else field(default_factory=one.default_factory)
        for one in own
    }
    unique = f"{held.__name__}_{sha256(f'{held.__module__} {name}'.encode()).hexdigest()[:16]}"
    namespace = {
        **{"__module__": __name__, "__qualname__": unique, "__doc__": held.__doc__},
        "__annotations__": {one.name: hints[one.name] for one in own} | {"name": Literal[name]},
        **values,
        "name": name,
    }
    globals()[unique] = made = dataclass(frozen=True)(type(held.__name__, (held, *defaults), namespace))
    return made


def _described(held: Any) -> str:
    return f"the class {held.__name__}" if inspect.isclass(held) else f"of {type(held).__name__}"
