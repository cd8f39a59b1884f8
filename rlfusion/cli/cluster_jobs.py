"""``rlfusion jobs``: parse and print."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlfusion.cli import words
from rlfusion.cli.arguments import parse
from rlfusion.cli.words import FLAGS
from rlfusion.common.errors import ConfigError, shorten, unknown
from rlfusion.common.stops import leaving

USAGE = """\
usage: rlfusion jobs list                              [--address URL]
       rlfusion jobs status NAME                       [--address URL]
       rlfusion jobs logs NAME [--follow]              [--address URL]
       rlfusion jobs stop NAME                         [--address URL]
       rlfusion jobs resume NAME [--change KEY=VALUE]... [--follow]
                                 [--address URL]

The jobs that rlfusion launch has submitted to a Ray cluster (docs/cluster.md).
URL is that of its dashboard; without it RAY_API_SERVER_ADDRESS of the
environment, or http://127.0.0.1:8265. Also: --ca FILE, --timeout_s SECONDS."""

STOPPED = 75
STOPPING_S = 30.0
"""Beside the seconds that the job was launched with, for Ray to say that a job has ended."""


def jobs(arguments: list[str]) -> int:
    """Ask or tell the jobs of a cluster.

    Raises:
        ConfigError: another word, or a job that is not there.
        UnavailableError: no cluster answers.
    """
    if not arguments or set(arguments) & set(FLAGS):
        print(USAGE)
        return 0
    action, *rest = arguments
    if action not in ACTIONS:
        raise unknown("word after rlfusion jobs", action, ACTIONS)
    return ACTIONS[action](rest)


def at(settings: Any) -> str:
    """The options by which another command reaches the same cluster."""
    given = {"address": settings.address, "ca": settings.ca}
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in given.items() if value)


def follow(cluster: Any, job: Any, settings: Any) -> int:
    """Print a job's log until it ends; its exit code. A Ctrl-C ends this alone."""
    with leaving(lambda _: f"job {job.name} goes on: rlfusion jobs stop {job.name}{at(settings)} stops it"):
        ended = cluster.follow(job, lambda text: print(text, end="", flush=True))
    print(f"job {ended.name}: {_state(ended)}")
    if ended.state == "SUCCEEDED":
        return 0
    return ended.exit_code or (STOPPED if ended.state == "STOPPED" else 1)


def _list(arguments: list[str]) -> int:
    settings, _, _ = _read("list", arguments, named=False)
    cluster = _cluster(settings)
    found = cluster.jobs()
    rows = [(j.name, j.state.lower(), j.metadata.get("command", ""), _at(j.start), _took(j)) for j in found.values()]
    _table(f"jobs at {cluster.address}", ("name", "state", "command", "began", "took"), rows)
    return 0


def _status(arguments: list[str]) -> int:
    settings, name, _ = _read("status", arguments)
    job = _cluster(settings).job(name)
    rows = [("state", _state(job)), ("command", job.metadata.get("command", "")), ("run", job.metadata["folder"])]
    rows += [("began", _at(job.start)), ("took", _took(job)), ("times submitted", str(job.attempt))]
    rows += [("rlfusion", job.metadata["version"]), ("env", json.loads(job.metadata["launch"])["env"])]
    rows += [("saved", saved)] if (saved := _saved(Path(job.metadata["folder"]))) else []
    rows += told(Path(job.metadata["folder"]))
    _table(f"job {job.name}", ("", ""), rows)
    return 0


def _logs(arguments: list[str]) -> int:
    settings, name, more = _read("logs", arguments, ("follow",))
    cluster = _cluster(settings)
    job = cluster.job(name)
    if more.get("follow"):
        return follow(cluster, job, settings)
    sys.stdout.write(cluster.log(job))
    return 0


def _stop(arguments: list[str]) -> int:
    settings, name, _ = _read("stop", arguments)
    cluster = _cluster(settings)
    job = cluster.job(name)
    if job.ended:
        raise ConfigError(f"job {name!r} has ended already: {_state(job)}")
    patience_s = float(json.loads(job.metadata["launch"])["stop_s"])
    print(f"job {name} finishes and saves its step, for at most {patience_s:g} s", flush=True)
    ended = cluster.stop(job, patience_s + STOPPING_S)
    print(f"job {name}: {_state(ended)}\ngo on with: rlfusion jobs resume {name}{at(settings)}")
    return 0


def _resume(arguments: list[str]) -> int:
    from rlfusion.jobs.launch import job

    settings, name, more = _read("resume", arguments, ("follow", "change"))
    cluster, made = job.resume(settings, name, more.get("change", []), bool(more.get("follow")))
    print(f"job {made.name} at {cluster.address} goes on with its run\n{made.metadata['folder']}", flush=True)
    return follow(cluster, made, settings) if more.get("follow") else 0


ACTIONS = {"list": _list, "status": _status, "logs": _logs, "stop": _stop, "resume": _resume}


def _cluster(settings: Any) -> Any:
    from rlfusion.jobs.launch.cluster import Cluster

    return Cluster(settings)


def _read(
    action: str, arguments: list[str], own: Sequence[str] = (), named: bool = True
) -> tuple[Any, str, dict[str, Any]]:
    """The connection, the name of the job, and the values of the options in ``own``.

    Raises:
        ConfigError: no name, more than one word, or an option that the action does not have.
    """
    from rlfusion.config.launch import Jobs

    usage = f"expected rlfusion jobs {action}{' NAME' if named else ''} and options (rlfusion jobs --help)"
    if named and (not arguments or arguments[0].startswith("-")):
        raise ConfigError(f"{shorten(' '.join(('rlfusion jobs', action, *arguments)))}: {usage}")
    name, rest = (arguments[0], arguments[1:]) if named else ("", arguments)
    more: dict[str, Any] = {}
    others = []
    for word in words.read(f"jobs {action}", rest):
        if word.key == "follow" and "follow" in own and word.text in (None, "true", "false"):
            more["follow"] = word.text != "false"
        elif word.key == "change" and "change" in own and word.text and "=" in word.text:
            more.setdefault("change", []).append(word.text)
        elif word.key in ("follow", "change"):
            raise ConfigError(f"rlfusion jobs {action} --{word.key} {shorten(repr(word.text))}: {usage}")
        else:
            others.append(f"--{word.key}" if word.text is None else f"--{word.key}={word.text}")
    return parse(Jobs, f"jobs {action}", others), name, more


def _saved(folder: Path) -> str:
    """What the run has saved, where its folder is seen from here."""
    from rlfusion.training import identity

    done = identity.done(folder) if (folder / "checkpoints").is_dir() else 0
    return f"{done} updates" if done else ""


def told(folder: Path) -> list[tuple[str, str]]:
    """What the run last said of its speed, where its folder is seen from here: rows of a table."""
    from rlfusion.training.timing import last_of

    if not (last := last_of(folder)):
        return []
    stages = {name.partition("/")[2]: value for name, value in last.items() if name.startswith("seconds/")}
    shares = ", ".join(f"{name} {value:.3g} s" for name, value in sorted(stages.items(), key=lambda s: -s[1]))
    rows = [("done", f"{last['step']} updates, {last['queries']} queries, {last['seconds']:.4g} s of training")]
    rows += [("stages", shares)] if shares else []
    counts = {name.partition("/")[2]: value for name, value in last.items() if name.startswith("bytes/")}
    moved = ", ".join(f"{name.replace('_', ' ')} {value / 1e6:.4g} MB" for name, value in counts.items())
    rows += [("moved", moved)] if moved else []
    shown = {"samples_per_second": "samples a second", "utilisation": "utilisation", "mfu": "MFU"}
    shown |= {"flops_per_second": "FLOP/s while learning"}
    return rows + [(text, f"{last[name]:.3g}") for name, text in shown.items() if name in last]


def _state(job: Any) -> str:
    if job.exit_code is not None and job.ended:
        return f"{job.state.lower()}, exit code {job.exit_code}"
    return f"{job.state.lower()}{f' ({job.message})' if job.message else ''}"


def _at(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _took(job: Any) -> str:
    if not job.start:
        return ""
    seconds = int((job.end or time.time()) - job.start)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rlfusion.cli import shown

    shown.texts(None, title, columns, rows)
