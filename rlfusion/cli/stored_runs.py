"""``rlfusion runs``: parse and print."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlfusion.common.errors import ConfigError, shorten, unknown

USAGE = """\
usage: rlfusion runs [list] [FOLDER...] [--json]
           the runs in runs/, or in these folders
       rlfusion runs status RUN [--json]
           one run: settings that are told, its last figures
       rlfusion runs best [FOLDER...] [--by SCALAR]
           of each reward the run of the greatest gain, or SCALAR
       rlfusion runs size [FOLDER...]
           the bytes of each, the largest first
       rlfusion runs remove RUN... [--yes]
           remove runs, checkpoints and models with them; asks, unless --yes

A run is a folder with run.json. One that is at work is not removed."""

ROOT = ["runs"]
UNITS = ("B", "kB", "MB", "GB", "TB")
AGES = ((86400, "d"), (3600, "h"), (60, "min"))


def runs(arguments: list[str]) -> int:
    """Show or remove runs.

    Raises:
        ConfigError: another word or option, or a folder that is no run.
    """
    if set(arguments) & {"-h", "--help"}:
        print(USAGE)
        return 0
    action, rest = (
        ("list", arguments) if not arguments or arguments[0] not in ACTIONS else (arguments[0], arguments[1:])
    )
    folders, options = _read(action, rest)
    if not folders and action in ("status", "remove"):
        raise ConfigError(f"rlfusion runs {action}: expected the folder of a run (rlfusion runs --help)")
    ACTIONS[action](folders, options)
    return 0


OPTIONS = {"list": ("json",), "status": ("json",), "best": ("by",), "size": (), "remove": ("yes",)}


def _read(action: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The folders, and the options with their values."""
    folders: list[str] = []
    options: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            folders.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in OPTIONS[action]:
            raise unknown(f"option of rlfusion runs {action}", word, [f"--{one}" for one in OPTIONS[action]])
        if name == "by" and not equals:
            if not words:
                raise ConfigError("--by has no value: expected --by SCALAR")
            value = words.pop(0)
        elif name != "by" and equals:
            raise ConfigError(f"{shorten(word)}: --{name} stands alone")
        options[name] = value
    if action == "list" and len(folders) == 1 and not _is_folder(folders[0]):
        raise unknown("word after rlfusion runs, or folder", folders[0], ACTIONS)
    return folders, options


def _is_folder(text: str) -> bool:
    from pathlib import Path

    return Path(text).exists() or "/" in text


def _list(folders: list[str], options: dict[str, str]) -> None:
    from rlfusion.jobs import stored_runs

    found = sorted(stored_runs.found(folders or ROOT), key=lambda run: run.seconds)
    if "json" in options:
        print(json.dumps([run.as_dict() for run in found], indent=1))
        return
    rows = [
        (str(run.folder), run.state, _done(run), run.reward, "" if run.gain is None else f"{run.gain:.2f}", _ago(run))
        for run in found
    ]
    _table(f"{len(found)} run(s)", ("run", "state", "done", "reward", "gain", "last"), rows)


def _status(folders: list[str], options: dict[str, str]) -> None:
    from rlfusion.jobs import stored_runs

    for run in [stored_runs.one(text) for text in folders]:
        if "json" in options:
            print(json.dumps(run.as_dict() | {"figures": run.figures}, indent=1))
            continue
        rows = [("command", run.command), ("state", run.state), ("done", _done(run)), ("agent", run.agent)]
        rows += [("reward", run.reward), ("seed", str(run.settings.get("seed", ""))), ("last at work", _ago(run))]
        rows += [("size", _bytes(stored_runs.size(run.folder)))]
        if run.state == "stopped":
            rows += [("go on with", f"rlfusion {run.command} --resume {run.folder}")]
        rows += [(name, f"{value:.4g}") for name, value in sorted(run.figures.items()) if name != "step"]
        _table(str(run.folder), ("", ""), [row for row in rows if row[1]])


def _best(folders: list[str], options: dict[str, str]) -> None:
    from rlfusion.jobs import stored_runs

    by = options.get("by", stored_runs.GAIN)
    held = stored_runs.best(stored_runs.found(folders or ROOT), by)
    rows = [(run.reward, str(run.folder), run.agent, f"{value:.4g}") for run, value in held]
    _table(f"the greatest {by}", ("reward", "run", "agent", by.rpartition("/")[2]), rows)


def _size(folders: list[str], options: dict[str, str]) -> None:
    from rlfusion.jobs import stored_runs

    runs = stored_runs.found(folders or ROOT)
    held = sorted(((stored_runs.size(run.folder), run) for run in runs), key=lambda one: -one[0])
    rows = [(str(run.folder), run.state, _bytes(size)) for size, run in held]
    _table(f"{len(rows)} run(s)", ("run", "state", "size"), rows)


def _remove(folders: list[str], options: dict[str, str]) -> None:
    from rlfusion.jobs import stored_runs

    held = [stored_runs.one(text) for text in folders]
    others = [run for one in held for run in stored_runs.found([str(one.folder.parent)])]
    gone = {run.folder.resolve() for run in held}
    for run in held:
        if run.state == "at work":
            raise ConfigError(f"{str(run.folder)!r} is at work: expected a run that is finished or stopped")
        standing = [str(one) for one in stored_runs.stands_on(run, others) if one.resolve() not in gone]
        beside = f"; {', '.join(dict.fromkeys(standing))} begins with its model" if standing else ""
        print(f"{run.folder}: {run.state}, {_bytes(stored_runs.size(run.folder))}{beside}")
    if "yes" not in options and not _agreed():
        raise ConfigError("nothing is removed: expected yes, or --yes")
    for run in held:
        stored_runs.remove(run)
    print(f"removed {len(held)} run(s)")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        return False
    return input("remove them for good? [yes/no] ").strip().lower() == "yes"


ACTIONS: dict[str, Callable[[list[str], dict[str, str]], None]] = {
    "list": _list,
    "status": _status,
    "best": _best,
    "size": _size,
    "remove": _remove,
}


def _done(run: Any) -> str:
    if run.done is None:
        return "all"
    total = run.settings.get("updates") or run.settings.get("train.steps") or run.settings.get("steps")
    return f"{run.done} of {total}" if total else f"{run.done}"


def _ago(run: Any) -> str:
    seconds = max(0.0, time.time() - run.seconds)
    return next((f"{int(seconds // one)} {name} ago" for one, name in AGES if seconds >= one), "just now")


def _bytes(count: int) -> str:
    value, unit = float(count), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rlfusion.cli import shown

    shown.texts(None, title, columns, rows)
