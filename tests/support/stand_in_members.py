"""Runs of a comparison whose process is a few lines of Python."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from rlfusion.common.progress import Progress
from rlfusion.config import Finetune
from rlfusion.jobs.compare import beside
from rlfusion.jobs.compare.members import Member

STAND_IN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / "begun").write_text(str(time.monotonic()))
exec((folder / "does").read_text())
(folder / "ended").write_text(str(time.monotonic()))
"""


@dataclass
class Standing(Member):
    """A run whose process is a few lines of Python."""

    @property
    def done(self) -> bool:
        return (self.folder / "ended").exists()

    def ready(self, progress: Progress) -> bool:
        return True

    def time(self, name: str) -> float:
        return float((self.folder / name).read_text())


def maker(folder: Path, patch: pytest.MonkeyPatch) -> Callable[..., list[Standing]]:
    """``make(line, line)``: runs in ``folder`` that do these lines."""
    patch.setattr(beside, "MEMBER", ("-c", STAND_IN))

    def make(*lines: str) -> list[Standing]:
        made = [Standing(f"a{n}", "ink", n, Finetune(), folder / f"run-{n}") for n in range(len(lines))]
        for member, line in zip(made, lines):
            member.folder.mkdir()
            (member.folder / "does").write_text(line)
            (member.folder / "config.yaml").write_text("seed: 0\n")
        return made

    return make


def said(width: int = 200) -> tuple[Progress, io.StringIO]:
    progress, text = Progress(), io.StringIO()
    progress.console = Console(file=text, width=width, highlight=False)
    return progress, text
