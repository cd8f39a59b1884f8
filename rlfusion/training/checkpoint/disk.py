"""Folders that are either whole or not there, whoever dies while he writes one."""

import json
import os
import shutil
import socket
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.training.checkpoint.manifest import NAME
from rlfusion.training.folders import require_held


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as JSON so that ``path`` holds either its old content or all of the new."""
    storage.write(path, json.dumps(value, indent=2))
    if storage.writes():
        _sync_folder(path.parent)


def _owned_name(kind: str, path: Path) -> Path:
    """A hidden sibling of ``path`` that says which process made it."""
    return path.with_name(f".{kind}-{path.name}-{socket.gethostname()}-{os.getpid()}")


def attempt(path: Path, files: dict[str, bytes]) -> None:
    """Write a checkpoint; what fails leaves nothing behind."""
    try:
        part = begin(path)
        add(part, files)
        give(part, path)
    except OSError:
        with suppress(OSError):  # the folder itself may be what is gone
            tidy(path.parent)
        raise


def begin(path: Path) -> Path:
    """A folder of this process, in which a checkpoint is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent)
    part = _owned_name("part", path)
    part.mkdir()
    return part


def add(part: Path, files: dict[str, bytes]) -> None:
    """Write files into it."""
    for name, blob in files.items():
        _write_file(part / name, blob)


def give(part: Path, path: Path) -> None:
    """Give it its name, once all that is in it is on the disk, unless another process has taken the run meanwhile."""
    _sync_folder(part)
    require_held(path.parent.parent)
    if os.path.lexists(path):
        path.rename(path.with_name(f".replaced-{path.name}"))
    part.rename(path)
    _sync_folder(path.parent)


def _write_file(path: Path, blob: bytes) -> None:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in ``folder``, by their names, newest first."""
    matches = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def set_aside(path: Path, why: str) -> Path:
    """Rename to the first free ``*.why``, ``*.why-2``, ..."""
    names = (f"{path.name}.{why}" + (f"-{n}" if n > 1 else "") for n in count(1))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    with storage.stored(path):
        return path.rename(aside)


def remove(path: Path) -> None:
    """Delete a checkpoint under another name, so that no half of it is ever taken for one."""
    _delete(path.rename(_owned_name("part", path)))


def _delete(path: Path) -> None:
    """Remove a folder, or what stands in its place; of a link not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def tidy(folder: Path) -> None:
    """Remove the leftovers of writers that died, and undo a replacement that was cut short."""
    if not folder.is_dir():
        return
    for old in folder.glob(".replaced-*"):
        path = folder / old.name.removeprefix(".replaced-")
        if os.path.lexists(path):
            _delete(old)
        else:
            old.rename(path)
    for part in folder.glob(".part-*"):
        if not _in_use(part.name):
            _delete(part)


def _in_use(name: str) -> bool:
    """Whether the owner of a temporary name is another process that lives, or may live on another machine."""
    head, _, owner = name.rpartition("-")
    if not head.endswith(f"-{socket.gethostname()}"):
        return True
    if not owner.isdecimal():
        return True
    pid = int(owner)
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
