"""The command line: ``rlfusion finetune | compare | pretrain | distill | sample | evaluate | ...``.

What goes wrong is one line on stderr; below it stand, of the user's own code, its frames of the traceback, and of an
error that was not foreseen all of it. Exit codes: the table of docs/inputs.md. Nothing heavy is imported before the
handlers of Ctrl-C and SIGTERM stand.
"""

import os
import re
import sys
from collections.abc import Callable
from functools import partial

from rlfusion.cli import help_pages
from rlfusion.common.stops import Entry, StopRequested

DONE, UNFORESEEN, INTERRUPTED = 0, 1, 130

MOST_CHARACTERS = 900
"""Of an error's line, whatever other libraries say in it."""
LONGEST_WORD = 400
"""Characters of a name or path in it that is said whole."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code. With ``argv`` the handlers of signals, and where modules are looked for,
    are put back at the end.
    """
    entry, places = Entry(), list(sys.path)
    handlers = entry.install()
    try:
        return guarded(_run, sys.argv[1:] if argv is None else argv, entry)
    finally:
        if argv is not None:
            entry.restore(handlers)
            sys.path[:] = places


def guarded(run: Callable[[list[str]], int], arguments: list[str], entry: Entry) -> int:
    """What ``run`` makes of the arguments, an exit code; what goes wrong is said in one line, and is one, too."""
    sys.path.append(os.getcwd())  # a user's package.module:name may lie there; last, so that it hides no library
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except StopRequested as stop:
        return _stopped(stop)
    except KeyboardInterrupt:
        return _say("stopped by Ctrl-C", INTERRUPTED)
    except Exception as error:
        return _stopped(entry.stopping) if entry.stopping and not _ours(error) else _failed(error, arguments)


def _stopped(stop: StopRequested) -> int:
    stop.arrived()
    return _say(f"stopped by {stop}; {stop.left}", stop.exit_code)


def _failed(error: Exception, arguments: list[str]) -> int:
    """Say what went wrong; the exit code."""
    import traceback

    from rlfusion.common.errors import foreseen
    from rlfusion.common.user_code import blamed

    known = foreseen(error) or blamed(error)
    if known is None:
        at = traceback.extract_tb(error.__traceback__)[-1]
        message = f"unforeseen: {type(error).__name__}: {_one_line(error)} ({at.filename}, line {at.lineno})"
        return _say(f"{message}; please report it with this traceback:\n{traceback.format_exc()}".rstrip(), UNFORESEEN)
    text = _as_typed(str(known), arguments)
    message = f"{known.kind}: {_one_line(text)}" if known.kind else _one_line(text)
    return _say("\n".join(filter(None, ["; ".join([message, *_notes(error)]), known.frames])), known.exit_code)


def _as_typed(text: str, arguments: list[str]) -> str:
    """An error in which the model is called as it was typed: --model is another name of finetune's --base."""
    typed = [f"--{name}" for name in ("base", "model") if any(a.partition("=")[0] == f"--{name}" for a in arguments)]
    return re.sub(r"(?<![\w.])base = ", "model = ", text) if typed == ["--model"] else text


def _ours(error: Exception) -> bool:
    from rlfusion.common.errors import RlfusionError

    return isinstance(error, RlfusionError)


def _say(text: str, code: int) -> int:
    print(f"rlfusion: {text}", file=sys.stderr)
    return code


def _run(arguments: list[str]) -> int:
    """Run a command; its exit code, where it is no error."""
    if arguments[:1] == ["help"] and len(arguments) == 2:
        arguments = [arguments[1], "--help"]
    if len(arguments) > 1 and arguments[0] in ("-h", "--help", "help", "--version"):
        from rlfusion.common.errors import ConfigError, shorten

        told = f"expected nothing behind {arguments[0]}, or rlfusion COMMAND --help"
        raise ConfigError(f"rlfusion {shorten(' '.join(arguments))}: {told}")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_pages.guide())
        return DONE
    if arguments[0] == "--version":
        from rlfusion import __version__

        print(__version__)
        return DONE
    if arguments[0].startswith("-"):
        from rlfusion.common.errors import ConfigError, shorten

        raise ConfigError(f"{shorten(repr(arguments[0]))} is no command: expected one first, as in rlfusion finetune")
    if arguments[0] not in COMMANDS:
        from rlfusion.common.errors import unknown

        raise unknown("command", arguments[0], COMMANDS)
    if text := help_pages.page(arguments):
        print(text, end="")
        return DONE
    _begins(arguments)
    return COMMANDS[arguments[0]](arguments[1:]) or DONE


def _begins(arguments: list[str]) -> None:
    """Tell a terminal at once that a command is there that imports torch first, which takes seconds."""
    if arguments[0] not in AT_ONCE and sys.stderr.isatty() and "--quiet" not in arguments:
        print(f"rlfusion {arguments[0]}: loading", file=sys.stderr)


def _job(kind: str, arguments: list[str]) -> None:
    """A new run of what takes --resume, or an old one to resume; with --quiet and --json."""
    from rlfusion.cli.words import mannered
    from rlfusion.common.manner import speaking

    arguments, how = mannered(arguments)
    with speaking(how):
        _run_job(kind, arguments)


def _run_job(kind: str, arguments: list[str]) -> None:
    from dataclasses import asdict

    from rlfusion.cli import tables
    from rlfusion.cli.arguments import resumed, settings_of
    from rlfusion.common.code_files import pinned
    from rlfusion.jobs import compare, distill, finetune, pretrain, pretrain_autoencoder, runs, train_clip

    check, run = {
        "finetune": (finetune.check, tables.run_finetune),
        "compare": (compare.check, tables.run_compare),
        "pretrain": (pretrain.check, tables.run_pretrain),
        "distill": (distill.check, tables.run_distill),
        "pretrain-autoencoder": (pretrain_autoencoder.check, tables.run_autoencoder),
        "train-clip": (train_clip.check, tables.run_clip),
    }[kind]
    if any(argument.partition("=")[0] == "--resume" for argument in arguments):
        settings, folder = resumed(kind, arguments, check)
        with pinned(asdict(settings)), runs.at_work(kind, folder, new=False):
            run(settings, folder)
        return
    settings = settings_of(kind, arguments)
    with pinned(asdict(settings)):
        check(settings)
        with runs.new_run(kind, settings, settings.default_name) as (settings, folder):
            run(settings, folder)


def _compare(arguments: list[str]) -> None:
    """Runs that are there, where folders stand first; else a new comparison."""
    given = _runs(arguments)
    if given is arguments:
        return _job("compare", arguments)
    from rlfusion.cli import tables
    from rlfusion.cli.arguments import parse
    from rlfusion.config import CompareRuns

    return tables.run_compare_runs(parse(CompareRuns, "compare", given))


def _plain(command: str, settings: str, first: str, model: str, arguments: list[str]) -> None:
    """A command that is its settings: of the class named ``settings`` in config, with the option ``first`` before a
    word that stands first, and with the defaults of the model that the option ``model`` names.
    """
    from rlfusion import config
    from rlfusion.cli import tables
    from rlfusion.cli.arguments import parse

    run = getattr(tables, f"run_{command.replace('-', '_')}")
    run(parse(getattr(config, settings), command, _first(arguments, first), model=model))


def _evaluate(arguments: list[str]) -> None:
    """A suite has a number of samples of its own."""
    from rlfusion.cli.defaults import told_last
    from rlfusion.common.errors import ConfigError

    suite = told_last(arguments, "suite") if any(word.startswith("--suite") for word in arguments) else None
    told = told_last(arguments, "evaluation", "samples") if suite else None
    if told is not None and suite:
        raise ConfigError(
            f"evaluation.samples = {told} with suite = {suite}: all prompts of a suite are drawn, expected per_prompt, "
            "the samples of each"
        )
    _plain("evaluate", "Evaluate", "", "checkpoint", arguments)


def _board(arguments: list[str]) -> None:
    _plain("board", "Board", "", "", _runs(arguments))


def _import_config(arguments: list[str]) -> None:
    """``PROGRAM FILE ...`` as its two settings."""
    if len(arguments) < 2 and not any(word.startswith("-") for word in arguments):
        from rlfusion.common.errors import ConfigError, shorten

        told = "no file" if arguments else "no program and no file"
        words = shorten(" ".join(["import-config", *arguments]))
        raise ConfigError(f"rlfusion {words} names {told}: expected rlfusion import-config PROGRAM FILE, as trl my.py")
    if not any(word.startswith("-") for word in arguments[:2]):
        arguments = ["--program", arguments[0], "--file", arguments[1], *arguments[2:]]
    _plain("import-config", "ImportConfig", "", "", arguments)


def _runs(arguments: list[str]) -> list[str]:
    """``RUN RUN ...`` as ``--runs [RUN, RUN] ...``; the same where an option stands first."""
    import json
    from itertools import takewhile

    runs = list(takewhile(lambda word: not word.startswith("-"), arguments))
    return ["--runs", json.dumps(runs), *arguments[len(runs) :]] if runs else arguments


def _list(arguments: list[str]) -> None:
    from rlfusion.cli.listing import show

    show(arguments)


def _completion(arguments: list[str]) -> None:
    from rlfusion.cli.completion import show

    show(arguments)


def _doctor(arguments: list[str]) -> None:
    from rlfusion.cli import tables
    from rlfusion.cli.arguments import settings_of
    from rlfusion.jobs import finetune
    from rlfusion.rewards import RewardError

    settings = settings_of("finetune", arguments) if arguments else None
    unscored = None
    if settings is not None:
        try:
            finetune.check(settings)
        except RewardError as error:
            unscored = error
    tables.run_doctor(settings, unscored)


def _supervise(arguments: list[str]) -> int:
    from rlfusion.cli import launching

    return launching.supervise(arguments)


def _launch(arguments: list[str]) -> int:
    from rlfusion.cli import launching

    return launching.launch(arguments)


def _jobs(arguments: list[str]) -> int:
    from rlfusion.cli import cluster_jobs

    return cluster_jobs.jobs(arguments)


def _stored(arguments: list[str]) -> int:
    from rlfusion.cli import stored_runs

    return stored_runs.runs(arguments)


def _rewards(arguments: list[str]) -> int:
    from rlfusion.cli import reward_kits

    return reward_kits.rewards(arguments)


def _first(arguments: list[str], option: str) -> list[str]:
    """``NAME ...`` as ``OPTION NAME ...``."""
    return [option, *arguments] if option and arguments and not arguments[0].startswith("-") else arguments


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "finetune": partial(_job, "finetune"),
    "compare": _compare,
    "pretrain": partial(_job, "pretrain"),
    "distill": partial(_job, "distill"),
    "pretrain-autoencoder": partial(_job, "pretrain-autoencoder"),
    "train-clip": partial(_job, "train-clip"),
    "sample": partial(_plain, "sample", "Sample", "", "checkpoint"),
    "evaluate": _evaluate,
    "check-model": partial(_plain, "check-model", "CheckModel", "--model", "model"),
    "doctor": _doctor,
    "check-reward": partial(_plain, "check-reward", "CheckReward", "--reward", "model"),
    "check-agent": partial(_plain, "check-agent", "CheckAgent", "--agent", ""),
    "reproduce": partial(_plain, "reproduce", "Reproduce", "--bundle", ""),
    "list": _list,
    "serve-reward": partial(_plain, "serve-reward", "Serve", "--reward", ""),
    "rewards": _rewards,
    "supervise": _supervise,
    "launch": _launch,
    "jobs": _jobs,
    "board": _board,
    "completion": _completion,
    "runs": _stored,
    "push": partial(_plain, "push", "Push", "--run", ""),
    "import-config": _import_config,
}
"""What runs each command; one that gives a number ends with it as its exit code."""

AT_ONCE = ("supervise", "completion")
"""Those that need no torch to begin."""


def _one_line(error: object) -> str:
    from rlfusion.common.errors import shorten

    words = (shorten(word, LONGEST_WORD) if len(word) > LONGEST_WORD else word for word in str(error).split())
    return shorten(" ".join(words), MOST_CHARACTERS)


def _notes(error: BaseException) -> list[str]:
    return [_one_line(note) for note in getattr(error, "__notes__", [])]
