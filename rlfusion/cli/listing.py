"""``rlfusion list [KIND]``: what there is of a kind, and where it comes from."""

import textwrap
from collections.abc import Iterable, Sequence

from rlfusion.cli.shown import texts
from rlfusion.common.errors import ConfigError, shorten, unknown
from rlfusion.jobs.doors import DOORS

USAGE = f"""\
usage: rlfusion list [KIND]

KIND is one of
{textwrap.fill(", ".join(DOORS), 80)}.
Each name can also be package.module:name or path/to/file.py:name, of your own
code (docs/doors.md)."""


def show(arguments: list[str]) -> None:
    """Print the names of a kind, or the kinds.

    Raises:
        ConfigError: an unknown kind, or more than one.
    """
    if arguments in (["--help"], ["-h"]):
        print(USAGE)
    elif not arguments:
        _print("rlfusion list KIND", ("kind", "names", "option"), _kinds())
    elif len(arguments) > 1:
        raise ConfigError(f"rlfusion list {shorten(' '.join(arguments))}: expected one of {', '.join(DOORS)}, or none")
    elif arguments[0] not in DOORS:
        raise unknown("kind", arguments[0], DOORS)
    else:
        registry, option = DOORS[arguments[0]]
        _print(f"{arguments[0]}, of {option}", ("name", "source", "what it is"), registry.rows())


def _kinds() -> list[tuple[str, str, str]]:
    return [(kind, str(len(registry.names())), option) for kind, (registry, option) in DOORS.items()]


def _print(title: str, columns: tuple[str, ...], rows: Iterable[Sequence[str]]) -> None:
    texts(None, title, columns, list(rows))
