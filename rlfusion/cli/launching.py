"""``rlfusion supervise``: parse and print."""

import sys

from rlfusion.cli.arguments import parse
from rlfusion.cli.words import FLAGS, RESUMABLE
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
