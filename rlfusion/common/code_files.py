"""Files that hold things by name, ``path/to/file.py:Name``: how a text names one, which file it was, and its module.

A file is found from the working directory, and is written down with its path from the root (``absolute``), so that a
process elsewhere finds it too. SHA-256 of its bytes goes with it (``files_of``), so that an edited file is noticed. A
worker on another machine gets the file's text (``texts_of``, ``receive``); nothing is ever unpickled.
"""

import hashlib
import linecache
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rlfusion.common.errors import ConfigError, near
from rlfusion.common.user_code import loading

ABSENT = "absent"


PLACED = re.compile(r"\s*(?![^('\"]*\s=\s)(?P<file>[^()'\"\n]+\.py):(?P<rest>\w+\s*(\(.*)?)", re.DOTALL)
"""A text that names a thing in a file, with settings or without."""


def absolute(text: str) -> str:
    """A text that names a thing in a file, with the file's path from the root; any other text as it is."""
    named = PLACED.fullmatch(text)
    return f"{Path(named['file']).resolve()}:{named['rest']}" if named else text


def label(text: str) -> str:
    """A short name of what a text names, for tables and folders: without its place and its settings."""
    name = PLACED.fullmatch(text)["rest"] if PLACED.fullmatch(text) else text
    return name.partition("(")[0].rpartition(":")[2].strip()


def files_of(value: Any) -> dict[str, str]:
    """SHA-256, by path, of every file that is named in ``value``, plain data, as the place of a thing.

    A file that is not there has "absent".
    """
    return {path: _digest(path) for path in _paths(value)}


def texts_of(value: Any) -> dict[str, str]:
    """The text of each such file, by path: what ``receive`` takes."""
    return {path: held.decode("utf-8") for path in _paths(value) if (held := _bytes(Path(path))) is not None}


_RECEIVED: dict[str, bytes] = {}


def receive(texts: Mapping[str, str]) -> None:
    """Take the files of these paths to be these texts, in this process, whatever lies there."""
    _RECEIVED.update({path: text.encode() for path, text in texts.items()})


@contextmanager
def pinned(value: Any) -> Iterator[None]:
    """Within the context the files named in ``value``, plain data, are what they are now, whoever edits them."""
    before = dict(_RECEIVED)
    receive(texts_of(value))
    try:
        yield
    finally:
        _RECEIVED.clear()
        _RECEIVED.update(before)


def found_again(files: Mapping[str, str], what: str) -> dict[str, str]:
    """Where the files of these SHA-256, by path, are now: there, or under their names in the working directory.

    Raises:
        ConfigError: one is nowhere, or was edited; ``what`` says what was made with it.
    """
    places = {}
    for path, digest in files.items():
        tried = [path, str(Path(Path(path).name).resolve())]
        places[path] = next((one for one in tried if _digest(one) == digest), "")
        if not places[path]:
            now = _digest(path)
            state = "is not there" if now == ABSENT else f"was edited since (its SHA-256 is {now[:12]})"
            raise ConfigError(
                f"{what} was made with {path} of SHA-256 {digest[:12]}, which {state}: expected that file as it was, "
                f"there or as {Path(path).name} in the working directory"
            )
    return places


def _paths(value: Any) -> list[str]:
    """The files, with their paths from the root, that texts of nested plain data name."""
    if isinstance(value, str):
        named = PLACED.fullmatch(value)
        return [str(Path(named["file"]).resolve())] if named else []
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return list(dict.fromkeys(path for one in value for path in _paths(one)))
    return []


def _bytes(path: Path) -> bytes | None:
    """What a file holds; None where there is none."""
    held = _RECEIVED.get(str(path.resolve()))
    return held if held is not None else path.read_bytes() if path.is_file() else None


def _digest(path: str) -> str:
    held = _bytes(Path(path))
    return ABSENT if held is None else hashlib.sha256(held).hexdigest()


def load_file(what: str, path: Path) -> tuple[ModuleType, str]:
    """The module that a file holds, once a process, and its digest; a file that changed is another module."""
    path, held = path.resolve(), _bytes(path)
    if held is None:
        others = near(path.name, (one.name for one in path.parent.glob("*.py")))
        hint = f"; did you mean {others[0]!r}?" if others else ""
        raise ConfigError(f"{what}: no file {str(path)!r} (from the folder {str(Path.cwd())!r}){hint}")
    name = f"rlfusion_file_{path.stem}_{hashlib.sha256(str(path).encode() + held).hexdigest()[:16]}"
    digest = hashlib.sha256(held).hexdigest()
    if name in sys.modules:
        return sys.modules[name], digest
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    try:
        with loading(what):
            exec(compile(held, str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    if not path.is_file():  # received: tracebacks and dataclasses read its source here
        text = held.decode("utf-8")
        linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    return module, digest
