"""Running: a run's folder and lock, stopping by signal, and the one training loop.

    for step, metrics in train(learner, batches, ...): ...           the caller logs, draws, stops

Work is saved every so many steps and when a signal asks to stop; what resumes continues bit for bit.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, StorageError, near, shorten
from rlfusion.common.stops import Signals, StopRequested
from rlfusion.training.optimization import Learner

LOCK_PATIENCE = 3600.0
_made: set[Path] = set()
"""The roots that this process made."""


def train(
    learner: Learner[Any],
    batches: Iterator[Any],
    start: int,
    total: int,
    every: int,
    save: Callable[[int], None],
    signals: Signals,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, metrics) for step = start..total-1, ``batches`` giving one batch a step.

    ``save(n)`` is called with n steps done: every ``every`` steps, at the end, and before stopping for a signal.

    Raises:
        StopRequested: a signal came; all updates that were done are saved.
    """
    unsaved = False

    def keep(done: int) -> None:
        nonlocal unsaved
        save(done)
        unsaved, signals.saved = False, True
        signals.hold(False)
        signals.check()

    signals.check()
    try:
        for step, batch in zip(range(start, total), batches):
            try:
                metrics = learner.update(batch)
            except StopRequested:  # within Signals.prompt: the learner is as it was after the update before
                if unsaved:
                    keep(step)
                raise
            unsaved = True
            signals.hold(True)
            yield step, metrics
            done = step + 1
            if done % every == 0 or done == total or signals.requested:
                keep(done)
    finally:
        signals.hold(False)


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


@contextmanager
def locked(folder: Path, signals: Signals | None = None, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold ``folder`` against other processes; the lock goes with the process, however it ends.

    With ``signals``, which may end the wait, it waits while another process holds it; without, it does not.

    Raises:
        ConfigError: another process holds it, and the wait, if any, outlasted an hour.
        StopRequested: a signal came while it waited.
    """
    with storage.stored(folder / ".lock"):
        file = (folder / ".lock").open("w")
    with file:
        deadline, told = time.monotonic() + LOCK_PATIENCE, False
        while not _try_lock(file):
            if signals is None or time.monotonic() > deadline:
                raise ConfigError(f"{str(folder)!r} is in use by another process")
            if not told:
                say(f"waiting for another process that works in {folder}")
            told = True
            signals.check()
            time.sleep(0.5)
        yield


def _try_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def set_numerics(threads: int, device: torch.device) -> None:
    """CPU threads of torch; and on a GPU the settings under which it repeats itself bit for bit, and rollout and
    learner agree: no TF32, deterministic kernels (where there is none, torch warns).
    """
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.use_deterministic_algorithms(True, warn_only=True)


DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DEVICES_MEANT = {"gpu": "cuda", "nvidia": "cuda", "tpu": "auto", "": "auto", "none": "auto"}


def pick_device(device: str) -> torch.device:
    """The device that a setting names; "auto" is cuda where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, colon, number = device.partition(":")
    if name not in DEVICES or (colon and not number.isdigit()):
        meant = DEVICES_MEANT.get(name.lower()) or next(iter(near(name, DEVICES)), "")
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ConfigError(f"device = {shorten(repr(device))}: expected auto, cpu, cuda or cuda:NUMBER{hint}")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = shorten(str(error).partition("\n")[0], 100)
        raise ConfigError(f"device = {device!r}: not available here ({said}); expected auto or cpu") from error
