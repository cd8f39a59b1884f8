"""``rlfusion supervise`` and ``rlfusion launch``: parse and print."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rlfusion.cli import words
from rlfusion.cli.arguments import parse, settings_of
from rlfusion.cli.words import FLAGS, RESUMABLE
from rlfusion.common.code_files import pinned
from rlfusion.common.errors import ConfigError, shorten, unknown


def supervise(arguments: list[str]) -> int:
    """Run the command after ``--`` until it ends for good; the exit code.

    Raises:
        ConfigError: no ``--``, or no command that makes a run after it.
    """
    from rlfusion.jobs import supervise as job

    own, command = _parted(arguments)
    if not command and not set(own) & set(FLAGS):
        raise ConfigError(f"rlfusion supervise {shorten(' '.join(arguments))}: expected -- and a command, {EXAMPLE}")
    settings = parse(job.Supervise, "supervise", own)
    require_run(command[0])
    with job.at_hand() as runner:
        return job.supervise(settings, command, runner, _say)


EXAMPLE = "as in rlfusion supervise -- finetune --reward ink"


def _parted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first ``--``, and what stands after it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def require_run(command: str) -> None:
    """Raise ConfigError unless ``command`` makes a run that can be resumed."""
    if command not in RESUMABLE:
        raise unknown("command that makes a run", command, RESUMABLE)


def _say(text: str) -> None:
    print(f"rlfusion supervise: {text}", file=sys.stderr, flush=True)


def launch(arguments: list[str]) -> int:
    """Submit a run as a job; the exit code, of the job where it is followed.

    Raises:
        ConfigError: settings that cannot work, a file that is not there, or a name that is taken.
        UnavailableError: no cluster answers.
    """
    from rlfusion.config.launch import Launch
    from rlfusion.jobs.launch import job

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in FLAGS):
        raise ConfigError("rlfusion launch: expected a command that makes a run, as in rlfusion launch finetune ...")
    if set(arguments) & set(FLAGS):
        parse(Launch, "launch", ["--help"])
    require_run(arguments[0])
    own, rest = _divided(arguments[1:], [field.name for field in fields(Launch)])
    settings = parse(Launch, "launch", own)
    named, order = True, _again(arguments[0], rest)
    if order is None:
        run = settings_of(arguments[0], rest)
        named = bool(run.name)
        with pinned(asdict(run)):
            order = job.new_order(settings, arguments[0], run, lambda text: print(text, flush=True))
    cluster, made = job.submit(settings, order, named)
    return _submitted(cluster, made, settings)


def _divided(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options that are launch's, and those of the command. ``--follow`` may stand alone."""
    own: list[str] = []
    rest: list[str] = []
    for word in words.read("launch", arguments):
        text = "true" if word.text is None and word.key == "follow" else word.text
        option = word.key if word.flag else f"--{word.key}" if text is None else f"--{word.key}={text}"
        (own if word.key in names else rest).append(option)
    return own, rest


def _again(command: str, arguments: list[str]) -> Any:
    """The order to go on with the run of ``--resume FOLDER``; None where there is no such option."""
    from rlfusion.jobs import resuming
    from rlfusion.jobs.launch.job import Order

    if not any(argument.partition("=")[0] == "--resume" for argument in arguments):
        return None
    folder, changes = resuming.asked(arguments)
    if not folder.is_absolute():
        raise ConfigError(f"--resume {str(folder)!r}: expected the absolute path that it has on the cluster")
    return Order(command, folder, {}, [f"{key}={value}" for key, value in changes.items()], again=True)


def _submitted(cluster: Any, made: Any, settings: Any) -> int:
    """Say what was submitted and how to go on from here; follow it where that is wanted."""
    from rlfusion.cli.cluster_jobs import at, follow

    where = at(settings)
    print(f"job {made.name} at {cluster.address}\nits run, on the cluster: {made.metadata['folder']}")
    for what, action in (("see it", "status"), ("stop it", "stop")):
        print(f"{what}: rlfusion jobs {action} {made.name}{where}", flush=True)
    return follow(cluster, made, settings) if settings.follow else 0
