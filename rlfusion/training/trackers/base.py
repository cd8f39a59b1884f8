"""What a tracker is: an object of a class with these methods, made with its settings, ``wandb(project='mine')``."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from rlfusion.common.errors import ConfigError

Ending = Literal["finished", "stopped", "failed"]
"""How a run ended: by itself, by a signal (it may be resumed), or by an error."""


class At(NamedTuple):
    """Where on its way a run is: updates done, and rewards asked for by then, which runs are compared over."""

    updates: int
    queries: int


@dataclass(frozen=True)
class Followed:
    """A run as its trackers get to know it.

    Attributes:
        name: of its folder.
        folder: where a tracker may keep files of its own.
        config: all settings, by dotted name.
        resume: what ``begin`` gave as ``Opened.id`` when the run began; "" for a new one.
    """

    name: str
    folder: Path
    config: Mapping[str, bool | str | float | int]
    resume: str = ""


class Opened(NamedTuple):
    """What ``begin`` gives: by which ``id`` the tracker finds its run again, and ``where`` a reader finds it."""

    id: str
    where: str = ""


class RunTracker(Protocol):
    """Follows one run. All but ``check`` is called in one thread, in this order; what raises is told once.

    ``scalars``, ``image`` and ``text`` come any number of times, ``summary`` once, in a run that finished.
    """

    def check(self) -> None:
        """Before anything runs: raises ConfigError, with the remedy, where the tracker cannot work here."""

    def begin(self, run: Followed) -> Opened:
        """A new run, or the one of ``run.resume`` again."""

    def scalars(self, at: At, values: Mapping[str, float]) -> None:
        """Figures by tag, ``train/reward``. They may be NaN."""

    def image(self, at: At, name: str, picture: np.ndarray, prompts: Sequence[str]) -> None:
        """A picture (H, W, 1 or 3) of 8-bit levels: a grid of samples, whose columns are of these ``prompts``."""

    def text(self, name: str, text: str) -> None:
        """A text by name, as Markdown."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The final figures."""

    def finish(self, status: Ending) -> None:
        """The run is over, or stopped; all that is on its way is to be written."""


def require_package(tracker: str, package: str) -> None:
    """
    Raises:
        ConfigError: the package is not installed. (A folder of its name in the working directory is none.)
    """
    held = sys.modules.get(package)
    spec = held.__spec__ if held is not None else importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"track = {tracker}: {package} is not installed: pip install {package}")
