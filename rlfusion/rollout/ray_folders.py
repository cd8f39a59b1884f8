"""The private folders of private Ray clusters: whose they are, and what becomes of those whose process was killed.

A folder holds a file ``owner`` with the number of the process that made it, which keeps the file locked while it lives.
The kernel gives the lock back however the process ends, so a folder whose lock can be had is nobody's any more: that
holds across containers and for numbers that are used again, where asking for the number alone does not.
"""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "rlf-"
OWNER = "owner"
_log = logging.getLogger(__name__)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of mode 0700 that goes with this process, or at the next start of another. Its path is short, as those
    of sockets must fit in 107 characters.
    """
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with _owned(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> list[Path]:
    """Remove the folders of this user whose process is dead. What has no ``owner``, a link, and what is somebody
    else's is left alone.
    """
    found = sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
    removed = [folder for folder in found if _is_ours(folder) and _remove_if_dead(folder)]
    if removed:
        _log.info("removed the folders of killed processes: %s", ", ".join(map(str, removed)))
    return removed


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Lock the file before it has its name, so that nobody finds it unlocked."""
    unnamed = folder / f".{OWNER}"
    with open(os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(f"{os.getpid()}\n")
        file.flush()
        unnamed.rename(folder / OWNER)
        yield


def _is_ours(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except FileNotFoundError:  # somebody else removed it
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700


def _remove_if_dead(folder: Path) -> bool:
    try:
        with open(os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # no owner, a link, or a living one: BlockingIOError
        return False
    return True
