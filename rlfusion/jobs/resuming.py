"""``--resume FOLDER [--change KEY=VALUE ...]``: the settings with which a run goes on.

They are those of the run (``identity``) and the changes that are meant; ``config.yaml`` must say the same, and says it
again afterwards. What does not decide bits may be edited there without a word.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError
from rlfusion.config import to_yaml
from rlfusion.jobs.runs import recorded
from rlfusion.training import deciding, identity
from rlfusion.training.folders import locked

FILES = deciding.FILES.rstrip(".")
USAGE = "--resume takes the run's folder, --change KEY=VALUE for each change that is meant, and nothing else"
FIXED = ("root", "name", "config", "objective", "print_config", "help", "resume", "change")
"""What is no setting of a run that could be changed; the first two are where its folder is."""

MADE_BY = ("agent", "method")
"""Groups of which the name says what made the checkpoint, which no other can go on with."""

PROMPTS = ("pipeline.prompts", "pipeline.prompt_column", "pipeline.encoding")
DIGESTS = {
    **dict.fromkeys(PROMPTS, "pipeline.prompts_sha256"),
    "pipeline.adapters": "pipeline.adapters_sha256",
}
"""What a change of a setting changes, too; with the same value it says that the file was edited on purpose."""

Read = Callable[[list[str]], Any]
"""The settings of a command from its arguments."""

Check = Callable[[Any], None]
"""Refuses settings that cannot work, before any work."""


def asked(arguments: list[str]) -> tuple[Path, dict[str, str]]:
    """The folder of ``--resume``, and the {key: value} of each ``--change``.

    Raises:
        ConfigError: something beside them.
    """
    folders, changes = [], {}
    words = [word for argument in arguments for word in _parted(argument)]
    if len(words) % 2:
        raise ConfigError(f"{USAGE}: got {' '.join(arguments)!r}; its settings are those of its config.yaml")
    for option, value in zip(words[::2], words[1::2]):
        key, equals, new = value.partition("=")
        if option == "--resume":
            folders.append(Path(value))
        elif option != "--change" or not equals or not key:
            raise ConfigError(f"{USAGE}: got {option} {value!r}; its settings are those of its config.yaml")
        elif key in FIXED:
            raise ConfigError(f"--change {key}: no setting of the run, whose folder may be moved and renamed as it is")
        elif key in [f"{group}.name" for group in MADE_BY] or (key in MADE_BY and new.isidentifier()):
            raise ConfigError(
                f"--change {key}={new}: no other {key.partition('.')[0]} can go on with the run's checkpoint; begin "
                "another run from its model, with --base"
            )
        else:
            changes[key] = new
    if len(folders) != 1:
        raise ConfigError(f"{USAGE}: got {len(folders)} folders")
    return folders[0], changes


def _parted(argument: str) -> list[str]:
    """``--resume=X`` and ``--change=X`` as two words."""
    option, equals, value = argument.partition("=")
    return [option, value] if equals and option in ("--resume", "--change") else [argument]


def settings_of_run(kind: str, folder: Path, changes: dict[str, str], read: Read, check: Check | None = None) -> Any:
    """The settings with which the run of command ``kind`` in ``folder`` goes on, its changes checked and recorded.

    Raises:
        DiffersError: config.yaml differs from the run in a setting that decides bits, and no change says so.
        ConfigError: no folder of a run, another command's, or a change that cannot be made.
    """
    file, record = folder / "config.yaml", _record(folder)
    if not file.is_file() and record is None:
        raise ConfigError(f"--resume {str(folder)!r}: expected the folder of a run, with config.yaml")
    if record is not None:
        identity.require_command(folder, record, kind)
    changes, edited = dict(changes), _edited(changes)
    changes.pop(FILES, None)
    if stale := {DIGESTS[key]: "" for key in changes if key in DIGESTS}:
        changes |= stale
        read = partial(_with_digest, read)
    options = [f"--{key}={value}" for key, value in changes.items()]
    with locked(folder):
        if record is not None and not file.is_file():
            storage.write(file, yaml.safe_dump(record.config, sort_keys=False))
        settings = read(["--config", str(file), *options])
        if record is None and changes:
            raise ConfigError(
                f"--change {next(iter(changes))}: {folder / identity.FILE} is lost: from what is not known; go on with "
                "--resume alone first, which makes it again from the newest checkpoint"
            )
        if record is not None:
            _compare(folder, record, settings, options, read, edited, check)
    return settings


def _with_digest(read: Read, words: list[str]) -> Any:
    """The settings of ``read`` with the digest of the prompts as they are now."""
    return recorded(read(words))


def _record(folder: Path) -> identity.Record | None:
    """What the run says of itself; None where that is lost, of which ``identity.enter`` makes what can be made."""
    try:
        return identity.Record.read(folder)
    except (ConfigError, FileNotFoundError):
        return None


def _edited(changes: dict[str, str]) -> bool:
    """Whether the user's own files are meant as they are now, ``--change files=edited``."""
    if changes.get(FILES, identity.EDITED) != identity.EDITED:
        raise ConfigError(f"--change {FILES}={changes[FILES]}: expected --change {FILES}={identity.EDITED}")
    return FILES in changes


def _compare(
    folder: Path,
    record: identity.Record,
    settings: Any,
    options: list[str],
    read: Read,
    files: bool,
    check: Check | None,
) -> None:
    """Refuse what nobody meant or what cannot work, and record what is meant; with ``files``, that the user's own were
    edited.
    """
    now, then = deciding.flat(settings), record.settings
    if deciding.differences(deciding.decisive(then), deciding.decisive(now)):
        again = deciding.flat(_read_again(record, options, read))
        then = again | {name: held for name, held in then.items() if name in again and name not in deciding.typed(then)}
    if files:
        then = deciding.typed(then) | {name: held for name, held in now.items() if name not in deciding.typed(now)}
    if edited := deciding.differences(deciding.decisive(then), deciding.decisive(now)):
        raise identity.DiffersError(identity.differs(folder, edited))
    total, done = now.get(identity.LENGTH.get(record.command, "")), identity.done(folder)
    if total is not None and total < done:
        raise ConfigError(identity.too_short(folder, done, total))
    if (options or files) and check is not None:
        check(settings)
    if options or deciding.digest(now) not in record.digests:
        storage.write(folder / "config.yaml", to_yaml(settings))
        identity.change(folder, record, settings, [option.removeprefix("--").partition("=")[0] for option in options])


def _read_again(record: identity.Record, options: list[str], read: Read) -> Any:
    """The settings of the record with these changes; a version of rlfusion that has more of them adds its defaults."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(record.config, file, sort_keys=False)
        file.flush()
        return read(["--config", file.name, *options])
