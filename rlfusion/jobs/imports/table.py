"""What is said of one setting of another program, and of all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlfusion.common.annotations import fits, shown
from rlfusion.common.errors import ConfigError, shorten, unknown

Given = Mapping[str, Any]
"""All settings of the other program by dotted name: those of the file, and the defaults of the rest."""

Made = dict[str, Any]
"""Ours by dotted name."""


@dataclass(frozen=True)
class Row:
    """One setting of another program.

    Attributes:
        name: dotted.
        default: there.
        ours: the settings of ours that it becomes, alone or with others; "" where it has no counterpart.
        why: how it becomes them where that is not plain; or why it has none.
        kind: what it may be there; by default what its default is.
    """

    name: str
    default: Any
    ours: str = ""
    why: str = ""
    kind: Any = None

    def require(self, value: Any) -> Any:
        """The value, where it may be one of this setting.

        Raises:
            ConfigError: it may not.
        """
        kind = self.kind or type(self.default)
        value = _typed(value, kind)
        if not fits(value, kind):
            raise ConfigError(f"{self.name} = {shorten(repr(value))}: expected {_called(kind)}")
        return value


def _typed(value: Any, kind: Any) -> Any:
    """A word of a command line, or of YAML 1.1 (``1e-4`` is none of its numbers), as what its setting may be."""
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, str) or kind in (str, str | None):
        return tuple(value) if isinstance(value, list) else value
    try:
        return {bool: {"true": True, "false": False}.__getitem__, int: int, float: float}[kind](value.lower())
    except (KeyError, ValueError):
        return value


def _called(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


@dataclass(frozen=True)
class Program:
    """Another program.

    Attributes:
        name: of it, as ``import-config`` takes it.
        what: it is, for readers.
        rows: its settings.
        mapped: all of them -> ours, and what is to be said of these values.
        missing: what no setting of it says, and a run needs.
    """

    name: str
    what: str
    rows: tuple[Row, ...]
    mapped: Callable[[Given], tuple[Made, list[str]]]
    missing: tuple[str, ...] = ()
    known: Mapping[str, Row] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", {row.name: row for row in self.rows})

    def complete(self, given: Given) -> dict[str, Any]:
        """The settings of a file, and the defaults of the rest.

        Raises:
            ConfigError: one that is unknown, or a value that it cannot have.
        """
        for name in given:
            if name not in self.known:
                raise unknown(f"setting of {self.what}", name, self.known)
        held = {name: self.known[name].require(value) for name, value in given.items()}
        return {row.name: held.get(row.name, row.default) for row in self.rows}

    def table(self) -> str:
        """Every setting as a row of Markdown."""
        lines = ["| setting | default | here | |", "|---|---|---|---|"]
        for row in self.rows:
            ours = " ".join(f"`{name}`" for name in row.ours.split()) or "-"
            lines.append(f"| `{row.name}` | `{shown(row.default)}` | {ours} | {row.why} |")
        return "\n".join(lines)


def nested(made: Made) -> dict[str, Any]:
    """Dotted names as groups."""
    held: dict[str, Any] = {}
    for name, value in made.items():
        *groups, last = name.split(".")
        group = held
        for one in groups:
            group = group.setdefault(one, {})
        group[last] = value
    return held
