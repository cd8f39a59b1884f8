"""The folder of a run: made, locked against other processes, and removed where it holds no work."""

import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, StorageError
from rlfusion.common.stops import Signals

LOCK_PATIENCE = 3600.0
MOMENT = 1.0
"""For which a lock is tried again where nobody waits for it: who only asks whether it is held (``in_use``) holds it."""
RUN_FILE = "RLFUSION_RUN_FILE"
"""The environment variable by which a supervisor asks where a run works: a file that is to hold its folder's path."""
_made: set[Path] = set()
"""The roots that this process made."""
_held: dict[Path, str] = {}
"""What the lock says of the folders that this process works in."""


def make_root(root: Path) -> None:
    """The folder of all runs, made where it is not there.

    Raises:
        StorageError: it cannot be made.
    """
    with storage.stored(root):
        made = not root.exists()
    storage.make_folder(root)
    if made:
        _made.add(root)


def new_folder(root: Path, name: str) -> Path:
    """A new folder ``root/name``, or ``name-2``, ``name-3``, ... where that exists.

    Raises:
        StorageError: it cannot be made.
    """
    make_root(root)
    for number in count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            with storage.stored(folder, refuse=(FileExistsError,)):
                folder.mkdir()
        except FileExistsError:
            continue
        except StorageError:
            discard(folder)
            raise
        return folder
    raise AssertionError("there is always a free number")


def discard(folder: Path) -> bool:
    """Remove the folder of a run, and an empty one around it, if it holds no work: nothing but settings, the lock,
    empty files and TensorBoard's. Whether it did.
    """
    with suppress(OSError):  # a name that cannot even be asked for
        if any(_is_work(file) for file in folder.rglob("*") if not file.is_dir()):
            return False
        shutil.rmtree(folder, ignore_errors=True)
    if folder.parent in _made:
        with suppress(OSError):  # other runs are in it
            folder.parent.rmdir()
    return not os.path.exists(folder)


def _is_work(file: Path) -> bool:
    beside = file.name in ("config.yaml", "run.json", ".lock", ".config.yaml.part") or file.name.startswith(
        "events.out."
    )
    return not beside and file.stat().st_size > 0


def tell_folder(folder: Path) -> None:
    """Tell the supervisor of this process, if there is one, which folder its run works in."""
    if file := os.environ.pop(RUN_FILE, ""):
        storage.write(Path(file), str(folder.resolve()))


@contextmanager
def locked(folder: Path, signals: Signals | None = None, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold ``folder`` against other processes; the lock goes with the process, however it ends. What it says is another
    text each time, by which others that work for this process see whether it still is this process that holds it.

    With ``signals``, which may end the wait, it waits while another process holds it; without, it does not.

    Raises:
        ConfigError: another process holds it, and the wait, if any, outlasted an hour.
        StopRequested: a signal came while it waited.
    """
    with storage.stored(folder / ".lock"):
        file = (folder / ".lock").open("ab")  # what another process wrote there stays while it holds it
    with file:
        deadline, told = time.monotonic() + (MOMENT if signals is None else LOCK_PATIENCE), False
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise ConfigError(f"{str(folder)!r} is in use by another process")
            if signals is None:
                time.sleep(MOMENT / 20)
                continue
            if not told:
                say(f"waiting for another process that works in {folder}")
            told = True
            signals.check()
            time.sleep(0.5)
        storage.patiently(lambda: _sign(file), folder / ".lock")
        works_for(folder, mark_of(folder))
        try:
            yield
        finally:
            _held.pop(folder.resolve(), None)


def mark_of(folder: Path) -> str:
    """What the lock of a folder says: who holds it, or held it last."""
    with storage.stored(folder / ".lock"):
        return (folder / ".lock").read_text()


def own_mark(folder: Path) -> str:
    """What the lock says for as long as this process may work in a folder; "" where it may anyway."""
    return _held.get(folder.resolve(), "")


def works_for(folder: Path, mark: str) -> None:
    """From here on this process works in ``folder`` for as long as its lock says this."""
    _held[folder.resolve()] = mark


def require_held(folder: Path) -> None:
    """Refuse to go on in a folder that another process has taken since: a rank may outlive its driver by a minute.

    Raises:
        ConfigError: another process holds it.
        StorageError: the lock cannot be read.
    """
    mark = own_mark(folder)
    if mark and (now := mark_of(folder)) != mark:
        theirs, ours = (" ".join(text.split()[:2]) or "nobody" for text in (now, mark))
        raise ConfigError(f"{str(folder)!r} is in use by another process since ({theirs}, after {ours}): this one ends")


def _sign(file: Any) -> None:
    os.ftruncate(file.fileno(), 0)
    os.write(file.fileno(), f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}".encode())


def in_use(folder: Path) -> bool:
    """Whether a process holds ``folder``, as ``locked`` does."""
    try:
        with (folder / ".lock").open("r") as file:
            return not _try_lock(file)
    except OSError:  # nothing was ever locked there, or it cannot be asked
        return False


def _try_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
