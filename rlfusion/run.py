"""Running: a run's folder and lock, stopping by signal, and the one training loop.

    for step, metrics in train(learner, batches, ...): ...           the caller logs, draws, stops

Work is saved every so many steps and when a signal asks to stop; what resumes continues bit for bit.
"""

import fcntl
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlfusion.errors import ConfigError
from rlfusion.learner import Learner

LOCK_PATIENCE = 3600.0


class StopRequested(Exception):
    """A signal asked to stop, and all work so far is saved (exit code 75)."""


class Signals:
    """Within the context SIGTERM and SIGINT only raise ``requested``; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = ""

    def __enter__(self) -> "Signals":
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def check(self) -> None:
        """Raise StopRequested if a signal came."""
        if self.requested:
            raise StopRequested(self.requested)


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
        StopRequested: after saving, where ``signals`` asked to stop before the last step.
    """
    for step, batch in zip(range(start, total), batches):
        metrics = learner.update(batch)
        yield step, metrics
        done = step + 1
        stop = signals.requested
        if done % every == 0 or done == total or stop:
            save(done)
        if stop and done < total:
            raise StopRequested(stop)


def new_folder(root: Path, name: str) -> Path:
    """A new folder ``root/name``, or ``name-2``, ``name-3``, ... where that exists."""
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


@contextmanager
def locked(folder: Path, signals: Signals | None = None, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold ``folder`` against other processes; the lock goes with the process, however it ends.

    With ``signals``, which may end the wait, it waits while another process holds it; without, it does not.

    Raises:
        ConfigError: another process holds it, and the wait, if any, outlasted an hour.
        StopRequested: a signal came while it waited.
    """
    with (folder / ".lock").open("w") as file:
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


def pick_device(device: str) -> torch.device:
    """The device that a setting names; "auto" is cuda where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {device!r}: not available here ({str(error).splitlines()[0]})") from error
