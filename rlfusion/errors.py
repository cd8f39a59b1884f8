"""The errors that rlfusion raises on purpose, each with the exit code of the command that it ends; and the near match.

The command line prints the message as one line. 75 (a signal, after saving) and 130 (Ctrl-C) are no errors.
"""

import difflib
from collections.abc import Iterable


class RlfusionError(Exception):
    """What the command line says in one line, ending with ``exit_code``. ``kind`` is what it calls it."""

    exit_code = 1
    kind = ""


class ConfigError(RlfusionError, ValueError):
    """A setting, an input or a file that cannot work, refused before any work starts."""

    exit_code = 2


class UserCodeError(RlfusionError, RuntimeError):
    """The user's own code (a reward, an agent) raised. The original error is the cause."""

    exit_code = 3
    kind = "your code failed"


class NumericalError(RlfusionError, ArithmeticError):
    """A non-finite number where a finite one is needed."""

    exit_code = 4
    kind = "numerical failure"


class UnavailableError(RlfusionError, RuntimeError):
    """Another process or machine that the work needs (a Ray cluster, workers, a reward server) cannot be had."""

    exit_code = 69
    kind = "unavailable"


class StorageError(RlfusionError, OSError):
    """A file or folder that cannot be written or read: the disk is full, read-only or gone."""

    exit_code = 74
    kind = "storage"


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
