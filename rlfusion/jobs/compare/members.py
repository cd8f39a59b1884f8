"""The runs of a comparison: each a fine-tuning in a folder of its own, done here, or found there."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.common.weights import sha256
from rlfusion.config import Finetune, to_yaml
from rlfusion.config.compare import Compare
from rlfusion.jobs import finetune
from rlfusion.jobs.compare.report import Outcome
from rlfusion.jobs.curves import Point, curve
from rlfusion.jobs.finetune.run import RESULT
from rlfusion.training import checkpoint, identity
from rlfusion.training.folders import discard

LONGEST_NAME = 180
"""Bytes of a run's name; a file system takes 255."""


@dataclass
class Member:
    """A run of a comparison. ``problem`` says why it has no evaluations, or ends before its time; ``code`` is the exit
    code of a process that died, None for none.
    """

    agent: str
    reward: str
    seed: int
    settings: Finetune
    folder: Path
    problem: str = ""
    code: int | None = None

    def __str__(self) -> str:
        return f"{self.agent} on {self.reward}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it is finished, all of it as it was written."""
        return identity.made(self.folder, self.settings, RESULT)

    def ready(self, progress: Progress) -> bool:
        """Make its folder; False where its settings cannot work, which ``problem`` tells."""
        try:
            finetune.check(self.settings)
        except ConfigError as error:
            self.problem = f"refused: {error}"
            return False
        _make_room(self.settings, self.folder, progress)
        storage.write(self.folder / "config.yaml", to_yaml(self.settings))
        return True

    def run(self, signals: Signals, progress: Progress) -> None:
        """Do it in this process."""
        try:
            finetune.finetune(self.settings, self.folder, signals, progress)
        except ConfigError as error:
            self.refused(str(error))
        except NumericalError as error:
            self.problem = f"failed: {error}"

    def refused(self, why: str) -> None:
        """It was refused at its beginning."""
        discard(self.folder)
        self.problem = f"refused: {why}"

    def outcome(self) -> Outcome:
        """What the report tells of it."""
        points = curve(self.folder) if not self.problem else self._so_far()
        return Outcome(self.agent, self.reward, self.seed, points, self.problem)

    def _so_far(self) -> list[Point]:
        """The evaluations of a run that ended early, none where that was before the first."""
        there = all((self.folder / name).is_file() for name in ("before.json", "timing.jsonl"))
        return curve(self.folder) if there else []


def members(config: Compare, base: Path | str, folder: Path) -> Iterator[Member]:
    """Every run of a comparison in ``folder`` whose base model is ``base``."""
    for agent, reward, seed, settings in config.runs():
        place = folder / place_of(agent, reward, seed)
        told = with_settings(settings, root=config.root, name=place.name, base=str(base))
        yield Member(agent, reward, seed, told, place)


def place_of(agent: str, reward: str, seed: int) -> str:
    """The name of a run's folder."""
    return slug(f"{agent}-{reward}-seed{seed}")


def slug(text: str) -> str:
    """A text as the name of a folder, of a long one its begin, its end and its SHA-256."""
    name = "".join(c if c.isalnum() or c in "._" else "-" for c in text).strip("-")
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[:40]}-{sha256(text.encode())[:12]}-{name[-30:]}"


def with_settings(settings: Finetune, **changes: Any) -> Finetune:
    """The same with other values, of settings that need no check anew."""
    return Finetune(**vars(settings) | changes)


def _make_room(settings: Finetune, folder: Path, progress: Progress) -> None:
    """A folder for a run; one of other settings, which the comparison had before a change, is set aside.

    Raises:
        ConfigError: nothing says which run is in it.
    """
    try:
        storage.make_folder(folder)
        identity.enter(folder, "finetune", settings)
    except identity.DiffersError as error:
        progress.say(f"{error}: set aside as {checkpoint.set_aside(folder, 'before').name}, and run again")
        storage.make_folder(folder)
