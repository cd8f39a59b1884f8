"""``rlfusion runs``: the runs that lie in a folder, in a line each; what the best of them are; and their removal."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.common.code_files import label
from rlfusion.common.errors import ConfigError, near, unknown
from rlfusion.common.jsonl import read_lines
from rlfusion.jobs.compare.earlier import reward_of
from rlfusion.training import identity
from rlfusion.training.folders import in_use, locked
from rlfusion.training.identity import Record
from rlfusion.training.tracking import flatten

FILE = "run.json"
GAIN = "evaluation/gain"
NEWEST = ("metrics.jsonl", "config.yaml", FILE)
"""The files by whose time a run was last at work."""


@dataclass(frozen=True)
class Stored:
    """A run in its folder.

    Attributes:
        folder: of it.
        command: that began it; "?" where run.json is damaged.
        state: "at work", "finished", "stopped", or "damaged".
        done: updates of its newest checkpoint; None where it is finished.
        settings: by dotted name.
        figures: the last value of each scalar of metrics.jsonl.
        seconds: since 1970 when it last wrote something.
    """

    folder: Path
    command: str
    state: str
    done: int | None
    settings: dict[str, Any]
    figures: dict[str, float]
    seconds: float

    @property
    def gain(self) -> float | None:
        """The last gain in standard deviations of the base's rewards; None where none was measured."""
        return self.figures.get(GAIN)

    @property
    def agent(self) -> str:
        """The algorithm in a word; "" of a run that has none."""
        return label(str(self.settings.get("agent.name") or self.settings.get("method.name") or ""))

    @property
    def reward(self) -> str:
        """The reward, or rewards; "" of a run that has none."""
        return reward_of(self.settings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        held = {"folder": str(self.folder), "command": self.command, "state": self.state, "updates": self.done}
        held |= {"agent": self.agent, "reward": self.reward, "seed": self.settings.get("seed"), "gain": self.gain}
        return held | {
            "bytes": size(self.folder),
            "last": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.seconds)),
        }


def found(folders: Sequence[str]) -> list[Stored]:
    """The runs in these folders: each that is a run, else those below it; of a comparison also its own.

    Raises:
        ConfigError: a folder that is not there.
    """
    runs: dict[Path, Stored] = {}
    for text in folders:
        folder = Path(text)
        if not folder.is_dir():
            raise ConfigError(f"{text!r} is no folder: expected that of a run, or of runs")
        for one in [folder] if (folder / FILE).is_file() else sorted(folder.iterdir()):
            runs |= {run.folder.resolve(): run for run in _with_own(one)}
    return list(runs.values())


def _with_own(folder: Path) -> Iterator[Stored]:
    if not (folder / FILE).is_file():
        return
    run = read(folder)
    yield run
    if run.command == "compare":
        yield from (read(file.parent) for file in sorted(folder.glob(f"*/{FILE}")))


def one(text: str) -> Stored:
    """The run in a folder.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(text)
    if not (folder / FILE).is_file():
        others = [other.parent.name for other in folder.parent.glob(f"*/{FILE}")] if folder.parent.is_dir() else []
        hint = f"; did you mean {str(folder.parent / nearest[0])!r}?" if (nearest := near(folder.name, others)) else ""
        raise ConfigError(f"{text!r} is no run: it has no {FILE}; expected a folder such as runs/NAME{hint}")
    return read(folder)


def read(folder: Path) -> Stored:
    """What a run's folder says of it."""
    times = [(folder / name).stat().st_mtime for name in NEWEST if (folder / name).is_file()]
    figures: dict[str, float] = {}
    for _, record in read_lines(folder / "metrics.jsonl")[0]:
        figures |= {name: value for name, value in record.items() if isinstance(value, int | float)}
    try:
        record = Record.read(folder)
    except ConfigError:
        return Stored(folder, "?", "damaged", identity.done(folder), {}, figures, max(times))
    state = "at work" if in_use(folder) else "finished" if record.sealed is not None else "stopped"
    done = None if state == "finished" else identity.done(folder)
    return Stored(folder, record.command, state, done, flatten(record.config), figures, max(times))


def best(runs: Sequence[Stored], by: str) -> list[tuple[Stored, float]]:
    """Of each reward the run whose last scalar ``by`` is greatest, with it.

    Raises:
        ConfigError: no run has such a scalar.
    """
    held = [(run, run.figures[by]) for run in runs if by in run.figures]
    if not held:
        known = sorted({name for run in runs for name in run.figures})
        raise unknown("scalar of the runs", by, known)
    groups: dict[str, list[tuple[Stored, float]]] = {}
    for run, value in held:
        groups.setdefault(run.reward, []).append((run, value))
    return [max(group, key=lambda one: one[1]) for group in groups.values()]


def size(folder: Path) -> int:
    """Bytes of all files of a run; links are not followed."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())


def stands_on(run: Stored, others: Sequence[Stored]) -> list[Path]:
    """The runs among ``others`` that begin with the model of ``run``, or are taught by it: they need it to go on."""
    place = run.folder.resolve()
    names = ("base", "teacher")
    found = []
    for other in others:
        models = [Path(text) for name in names if (text := str(other.settings.get(name) or ""))]
        if other.folder.resolve() != place and any(model.resolve().is_relative_to(place) for model in models):
            found.append(other.folder)
    return found


def remove(run: Stored) -> None:
    """Remove a run's folder with all that is in it.

    Raises:
        ConfigError: a process is at work there, or the folder is a link.
        StorageError: it cannot be removed.
    """
    if run.folder.is_symlink():
        raise ConfigError(f"{str(run.folder)!r} is a link to a run: expected the folder itself")
    if not (run.folder / FILE).is_file():
        raise ConfigError(f"{str(run.folder)!r} is no run: it has no {FILE}")
    with locked(run.folder), storage.stored(run.folder):
        shutil.rmtree(run.folder)
