"""``rlfusion compare RUN...``: the report of runs that are there, read from their folders as far as they are."""

import glob
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.common.code_files import label
from rlfusion.common.errors import ConfigError, unknown
from rlfusion.config.compare_runs import CompareRuns
from rlfusion.jobs.compare.baselines import BASE
from rlfusion.jobs.compare.report import Baselines, Outcome, Terms, Untrained, report
from rlfusion.jobs.curves import base_of, curve
from rlfusion.training.folders import new_folder
from rlfusion.training.identity import Record
from rlfusion.training.tracking import flatten

ASIDE = ("name", "root", "seed")
"""Settings in which runs may differ without being another kind of run."""


@dataclass(frozen=True)
class Earlier:
    """A run: its folder, and its settings by dotted name."""

    folder: Path
    settings: dict[str, Any]
    finished: bool

    @property
    def reward(self) -> str:
        """Of several, with their weights."""
        return reward_of(self.settings)

    def _group(self, group: str) -> dict[str, Any]:
        return {k.removeprefix(f"{group}."): v for k, v in self.settings.items() if k.startswith(f"{group}.")}


def reward_of(settings: Mapping[str, Any]) -> str:
    """The reward that settings by dotted name have, of several with their weights; "" for none."""
    several = {k.removeprefix("reward."): v for k, v in settings.items() if k.startswith("reward.")}
    return str(settings.get("reward") or several or "")


def compare_runs(settings: CompareRuns) -> tuple[str, Path]:
    """Write the report; its Markdown, and the folder.

    Raises:
        ConfigError: a folder that is no run, runs that cannot stand in one table or cannot be told apart.
        StorageError: the report cannot be written.
    """
    found = [run for text in settings.runs for run in _found(text)]
    runs = list({run.folder.resolve(): run for run in found}.values())
    names = dict(zip((run.folder for run in runs), labels(runs, settings.by)))
    _require_apart(runs, names)
    outcomes = [_outcome(run, names[run.folder]) for run in runs]
    rewards = list(dict.fromkeys(o.reward for o in outcomes if o.points))
    if not rewards:
        raise ConfigError(f"runs = {settings.runs}: none has an evaluation yet, expected one at least")
    measured = {reward: Untrained(_bases(reward, runs)) for reward in rewards}
    terms = Terms(
        budget=_budget(outcomes),
        agents=list(dict.fromkeys(names.values())),
        rewards=rewards,
        target=settings.target,
        quality=settings.quality,
        note=_note(runs),
        command=" ".join(["rlfusion compare", *map(shlex.quote, settings.runs), "--by", ",".join(settings.by)]),
        differing=_differing(runs),
    )
    if settings.out:
        storage.make_folder(folder := Path(settings.out))
    else:
        folder = new_folder(runs[0].folder.parent, f"compare-{'-'.join(settings.by)}")
    places = {(o.agent, o.reward, o.seed): run.folder for o, run in zip(outcomes, runs)}
    return report(terms, folder, outcomes, measured, places), folder


def _found(text: str) -> Iterator[Earlier]:
    """The runs of a folder or of a pattern of folders.

    Raises:
        ConfigError: there is none.
    """
    folders = [Path(text)] if Path(text).is_dir() else sorted(Path(name) for name in glob.glob(text))
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise ConfigError(
            f"run {text!r} does not exist: expected the folder of a run, such as runs/NAME; a new comparison begins "
            "with options, as in rlfusion compare --agents ddpo,grpo"
        )
    several = len(folders) > 1
    for folder in folders:
        record = _record(folder, must=not several)
        if record is None or (several and record.command not in ("finetune", "compare")):
            continue  # a pattern meets the cache, too
        if record.command == "compare":
            inner = sorted(file.parent for file in folder.glob("*/run.json"))
            yield from (_read(one, _record(one, must=True)) for one in inner)
        elif record.command == "finetune":
            yield _read(folder, record)
        else:
            raise ConfigError(f"{str(folder)!r} is a run of {record.command}: expected one of finetune or compare")


def _record(folder: Path, must: bool) -> Record | None:
    try:
        return Record.read(folder)
    except FileNotFoundError:
        if must:
            raise ConfigError(
                f"{str(folder)!r} is no run: it has no run.json; expected a folder such as runs/NAME"
            ) from None
        return None


def _read(folder: Path, record: Record | None) -> Earlier:
    assert record is not None  # it must be there
    return Earlier(folder, flatten(record.config), record.sealed is not None)


def labels(runs: list[Earlier], by: list[str]) -> list[str]:
    """What each run is called: its values of the settings ``by``, those of the agent with or without ``agent.``.

    Raises:
        ConfigError: no run has such a setting.
    """
    known = {name for run in runs for name in run.settings}
    groups = {name.rpartition(".")[0] for name in known if "." in name}
    names = [name if name in known | groups else f"agent.{name}" for name in by]
    for name, whole in zip(by, names):
        if whole not in known | groups:
            raise unknown("setting of the runs", name, sorted(known | groups))
    return [" ".join(_label(run, runs, name) for name in names) for run in runs]


def _label(run: Earlier, runs: list[Earlier], name: str) -> str:
    if name in run.settings:
        value = str(run.settings[name])
        return label(value) if name in ("reward", "agent") else f"{name.rpartition('.')[2]}={value}"
    own = run._group(name)
    if not own:
        return f"no {name}"
    head = str(own.get("name", ""))
    alike = [other._group(name) for other in runs if str(other._group(name).get("name", "")) == head]
    told = [f"{key}={value}" for key, value in own.items() if any(o.get(key) != value for o in alike)]
    return f"{label(head) or name}({', '.join(told)})" if told else label(head) or name


def _require_apart(runs: list[Earlier], names: Mapping[Path, str]) -> None:
    """Refuse two runs of one name, reward and seed."""
    seen: dict[tuple[str, str, Any], Earlier] = {}
    for run in runs:
        key = names[run.folder], run.reward, run.settings.get("seed")
        if (other := seen.setdefault(key, run)) is run:
            continue
        differ = [name for name in _differ([run, other]) if name not in ASIDE]
        told = (
            f"they differ in {', '.join(differ[:5])}: expected --by with one of these" if differ else "they are equal"
        )
        raise ConfigError(
            f"{str(other.folder)!r} and {str(run.folder)!r} are both {key[0]} on {key[1]} with seed {key[2]}; {told}, "
            "or one of the two"
        )


def _differ(runs: list[Earlier]) -> list[str]:
    """The settings in which runs differ."""
    known = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in known if len({str(run.settings.get(name)) for run in runs}) > 1]


def _differing(runs: list[Earlier]) -> dict[str, dict[str, str]]:
    names = [name for name in _differ(runs) if name not in ("name", "root")]
    return {str(run.folder): {name: str(run.settings.get(name, "")) for name in names} for run in runs if names}


def _outcome(run: Earlier, name: str) -> Outcome:
    measured = (run.folder / "before.json").is_file()
    points = curve(run.folder) if measured else []
    return Outcome(name, run.reward, run.settings["seed"], points, "" if measured else "no evaluation yet")


def _bases(reward: str, runs: list[Earlier]) -> Baselines:
    """The base models of the runs on a reward, the first as such.

    Raises:
        ConfigError: some have data to compare with, and some have none.
    """
    of = {
        run.folder: base_of(run.folder)
        for run in runs
        if run.reward == reward and (run.folder / "before.json").is_file()
    }
    first, base = next(iter(of.items()))
    found: Baselines = {BASE: base}
    for folder, other in of.items():
        if ("frechet" in other) != ("frechet" in base):
            raise ConfigError(
                f"{str(first)!r} and {str(folder)!r} cannot stand in one table: one has data to be compared with, and "
                "the other has none; expected runs of one kind for a reward"
            )
        if other != base:
            found[f"{BASE} of {folder.name}"] = other
    return found


def _budget(outcomes: list[Outcome]) -> str:
    ends = sorted({o.points[-1].queries for o in outcomes if o.points})
    spent = f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,} to {ends[-1]:,}, which is not the same for all,"
    return f"{len(outcomes)} earlier run(s) of {spent} queries"


def _note(runs: list[Earlier]) -> str:
    unfinished = [run.folder.name for run in runs if not run.finished]
    return f" Not finished: {', '.join(unfinished)}." if unfinished else ""
