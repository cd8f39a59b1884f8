"""Settings of strangers that are chosen by name: a dataclass of theirs, with the name that finds it as a setting."""

import inspect
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal

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
    for field in fields(held):
        if field.default is MISSING and field.default_factory is MISSING and field.name != "name":
            raise ConfigError(f"{named}: its setting {field.name!r} has no default, expected one")
    made: Any = type(held.__name__, (held, *defaults), _namespace(held, name))
    lacking = [one for one in members(protocol) if one not in dir(made)]
    if lacking:
        raise ConfigError(f"{named} is without {', '.join(lacking)}: expected {expected} (docs/doors.md)")
    return dataclass(frozen=True)(made)


def _namespace(held: type, name: str) -> dict[str, Any]:
    own = {"__module__": held.__module__, "__qualname__": held.__qualname__, "__doc__": held.__doc__}
    return {**own, "__annotations__": {"name": Literal[name]}, "name": name}


def _described(held: Any) -> str:
    return f"the class {held.__name__}" if inspect.isclass(held) else f"of {type(held).__name__}"
