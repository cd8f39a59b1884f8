"""The errors that rlfusion raises on purpose, and the near match that they name."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that cannot work, refused before any work starts (exit code 2)."""


class NumericalError(ArithmeticError):
    """A non-finite number where a finite one is needed (exit code 4). ``kind`` is what the command line calls it."""

    kind = "numerical failure"


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown ``name``: says what was expected and which known name is nearest."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {what} {name!r}: expected one of {', '.join(known)}{hint}")


def require_positive(settings: object, *names: str) -> None:
    """Raise ConfigError unless each named setting is a number > 0 (NaN is not)."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ConfigError(f"{name} = {getattr(settings, name)}: expected a number > 0")


def require_not_negative(settings: object, *names: str) -> None:
    """Raise ConfigError unless each named setting is a number >= 0 (NaN is not)."""
    for name in names:
        if not getattr(settings, name) >= 0:
            raise ConfigError(f"{name} = {getattr(settings, name)}: expected a number >= 0")
