"""Lines of JSON as a run writes them, read again after whatever became of the file."""

import errno
import json
import stat
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError


def read_lines(file: Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """The lines of ``file`` that are whole, each with the record that it holds, and how many are not.

    A record is an object with a whole number >= 0 as its "step". No file has no lines.

    Raises:
        ConfigError: something else than a file is in its place.
    """
    try:
        regular = stat.S_ISREG(file.stat().st_mode)  # looked at once: another rank may be making it
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        if not file.is_symlink():
            return [], 0
        regular = False
    if not regular:
        raise ConfigError(f"{str(file)!r} is no file: expected lines of JSON, or nothing")
    found: list[tuple[str, dict[str, Any]]] = []
    lines = file.read_bytes().split(b"\n")
    for line in lines:
        if (record := _record(line)) is not None:
            found.append((line.decode(), record))
    return found, sum(bool(line) for line in lines) - len(found)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        held = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = held.get("step") if isinstance(held, dict) else None
    return held if type(step) is int and step >= 0 else None
