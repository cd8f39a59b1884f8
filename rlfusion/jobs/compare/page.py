"""``report.html``: a comparison as one file that needs no other, with its tables, figures and samples."""

import base64
import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlfusion.jobs.compare.tables import Table

SHEETS = ("before", "after")
VERSIONS = ("rlfusion", "torch", "numpy", "ray")
MOST_ALARMS = 3


@dataclass(frozen=True)
class Run:
    """A run as the page shows it: its PNG pictures as base64, by name, and what its monitor said first."""

    name: str
    sheets: dict[str, str]
    alarms: list[str]

    @classmethod
    def read(cls, name: str, folder: Path) -> "Run":
        """From its folder; what is not there is not shown."""
        sheets = {sheet: _encoded(folder / "samples" / f"{sheet}.png") for sheet in SHEETS}
        diagnosis = folder / "diagnosis.md"
        lines = diagnosis.read_text(errors="replace").splitlines() if diagnosis.is_file() else []
        told = [line.lstrip("#- ") for line in lines if line.startswith(("## ", "- "))]
        return cls(name, {sheet: data for sheet, data in sheets.items() if data}, told[:MOST_ALARMS])


@dataclass(frozen=True)
class Section:
    """What is said of one reward: tables, a figure as SVG ("" for none), and the runs."""

    title: str
    tables: list[Table]
    figure: str
    runs: list[Run]


@dataclass(frozen=True)
class Page:
    """The page. ``differing``: {run: {setting: value}} of the settings in which the runs differ."""

    title: str
    head: str
    command: str
    sections: list[Section]
    differing: dict[str, dict[str, str]]

    def html(self) -> str:
        """As one text."""
        return _template().render(
            page=self,
            figures=[_embedded(section.figure) for section in self.sections],
            settings=list(dict.fromkeys(name for values in self.differing.values() for name in values)),
            versions={name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        )


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )


def _encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode() if file.is_file() else ""


def _embedded(svg: str) -> str:
    """A figure as an image's address: in an image two figures' names do not meet, and no script in it runs."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" if svg else ""
