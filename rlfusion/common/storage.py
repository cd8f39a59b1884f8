"""Writing files: each appears whole or not at all, a disk without room is waited for, and what fails is one line.

All that a run writes goes through here, so that an error of the operating system becomes a ``StorageError`` with the
path and the cause in one place. A disk or quota that is full may be made room on: the write is tried again, with a
message, for ``RLFUSION_STORAGE_PATIENCE_S`` seconds (``PATIENCE_S`` by default).
"""

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from rlfusion.common.errors import ConfigError, StorageError
from rlfusion.common.stops import in_force

PATIENCE_S = 300.0
VARIABLE = "RLFUSION_STORAGE_PATIENCE_S"
RETRY_S = 2.0
FULL = {errno.ENOSPC, errno.EDQUOT}
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
CAUSES = {
    errno.ENOTDIR: "part of this path is a file, expected a folder",
    errno.EEXIST: "it is a file, expected a folder",
    errno.EISDIR: "it is a folder, expected a file",
    errno.ENOENT: "no such folder, or not any more",
}
"""Said in place of the system's own words, of what is written."""
Result = TypeVar("Result")
Bytes = bytes | memoryview


def failure(path: Path, error: OSError, note: str = "") -> StorageError:
    """The StorageError of a write to ``path``."""
    if isinstance(error, StorageError):
        return error
    cause = CAUSES.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    return StorageError(error.errno or errno.EIO, cause + note, str(path))


@contextmanager
def stored(path: Path, refuse: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """Within the context an error of the operating system is a StorageError of ``path``, but those of ``refuse``."""
    try:
        yield
    except refuse:
        raise
    except OSError as error:
        raise failure(path, error) from error


def told(text: str) -> tuple[int, str]:
    """The system's error number and words in what safetensors says of one; EIO and the text where there is none."""
    found = re.search(r"(?:os error |code: )(\d+)", text)
    return (int(found[1]), os.strerror(int(found[1]))) if found else (errno.EIO, text)


def patience_s() -> float:
    """For how long a full disk is waited for.

    Raises:
        ConfigError: the environment variable holds no number of seconds.
    """
    told = os.environ.get(VARIABLE, "")
    try:
        seconds = float(told) if told else PATIENCE_S
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ConfigError(f"{VARIABLE} = {told!r}: expected seconds >= 0")
    return seconds


def patiently(write: Callable[[], Result], path: Path, note: str = "") -> Result:
    """What ``write`` gives; while the disk is full it is tried again. ``write`` leaves nothing behind where it fails.

    Raises:
        StorageError: it failed, or no room was made in time, or a signal ended the wait.
    """
    deadline = None
    while True:
        try:
            return write()
        except OSError as error:
            now, why = time.monotonic(), failure(path, error, note)
            if why.errno not in FULL:
                raise why from error
            if deadline is None:
                deadline = now + patience_s()
                print(f"rlfusion: storage: {why}; waiting up to {deadline - now:.0f} s for room", file=sys.stderr)
            if now >= deadline or in_force().requested:
                raise why from error
            time.sleep(min(RETRY_S, max(0.0, deadline - now)))


_silent = False


@contextmanager
def silent() -> Iterator[None]:
    """Within the context this process writes nothing: another one of the same run writes the same."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def writes() -> bool:
    """Whether this process writes what its run is to keep; false within ``silent``."""
    return not _silent


def write(path: Path, content: bytes | str) -> None:
    """Write a file so that ``path`` holds either its old content or all of the new, also after a power cut.

    Raises:
        StorageError: it cannot be written.
    """
    if _silent:
        return
    blob = content.encode() if isinstance(content, str) else content
    patiently(lambda: _write(path, blob), path)


def _write(path: Path, blob: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def stream(path: Path, parts: Iterable[Bytes], anyway: bool = False) -> None:
    """As ``write``, of a content that is made part by part: it is never there as a whole. Within ``silent`` the parts
    are made nonetheless, and written where that is to be done ``anyway``: no other process writes the same.

    Raises:
        StorageError: it cannot be written.
    """
    if _silent and not anyway:
        for _ in parts:
            pass
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        patiently(lambda: part.write_bytes(b""), path)
        for some in parts:
            _added(part, some, path)
        patiently(lambda: _give(part, path), path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _added(part: Path, content: Bytes, path: Path) -> None:
    patiently(lambda: _append(part, content), path)


def _give(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def append(path: Path, content: bytes | str) -> None:
    """Add to the end of a file: all of the content, or nothing.

    Raises:
        StorageError: it cannot be written.
    """
    if _silent:
        return
    blob = content.encode() if isinstance(content, str) else content
    patiently(lambda: _append(path, blob), path)


def _append(path: Path, blob: Bytes) -> None:
    held = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before, rest = os.fstat(held).st_size, memoryview(blob)
        try:
            while rest:
                rest = rest[os.write(held, rest) :]
        except BaseException:
            os.ftruncate(held, before)
            raise
    finally:
        os.close(held)


def make_folder(path: Path) -> Path:
    """The folder ``path``, made with those around it where it is not there.

    Raises:
        StorageError: it cannot be made.
    """
    require_local("folder", str(path))

    if _silent:
        return path

    def make() -> Path:
        path.mkdir(parents=True, exist_ok=True)
        return path

    return patiently(make, path)


def require_local(what: str, path: str) -> None:
    """Raise StorageError where ``path``, the setting ``what``, is a URL and no path on this machine."""
    if URL.match(path):
        raise StorageError(errno.EINVAL, f"{what} is a URL, expected a path on this machine (mount it)", path)
