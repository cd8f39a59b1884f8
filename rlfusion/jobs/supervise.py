"""``rlfusion supervise -- COMMAND ...``: runs a command in a process of its own, and resumes its run where that dies.

    0, 2, 3, 4, 130    the command ended for good: its code is ours
    75                 it was preempted and has saved: resumed, within ``preemptions``
    1, 69, 74          it crashed, or lost what it needs: resumed, within ``restarts``
    a signal           killed: resumed, within ``restarts``

A budget counts restarts in a row: each is full again once a checkpoint was saved that no process before had. Before the
n-th restart in a row it waits ``backoff_s`` 2^(n - 1) seconds, at most ``MOST_BACKOFF_S``. A SIGINT or SIGTERM of the
supervisor is handed to the command, and then nothing is restarted. Where the supervisor itself is killed, the kernel
sends the command a SIGTERM.

This process lives as long as the run does, so it imports neither torch nor Ray.
"""

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from rlfusion.common.errors import require_not_negative
from rlfusion.common.stops import CODES, SHOWN, StopRequested
from rlfusion.training.folders import RUN_FILE, discard

CRASHES, PREEMPTED = (1, 69, 74), 75
MOST_BACKOFF_S = 300.0
SAVED = re.compile(r"step-(\d+)")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Supervise:
    """Run a command that makes a run, and resume the run where its process dies.

    Attributes:
        restarts: after a crash (a signal, exit code 1, 69 or 74), how many in a row without a new checkpoint.
        preemptions: the same after exit code 75, a process that was told to stop and has saved.
        backoff_s: seconds before the first restart in a row; twice as many before each further one, at most 300.
    """

    restarts: int = 5
    preemptions: int = 100
    backoff_s: float = 5.0

    def __post_init__(self) -> None:
        require_not_negative(self, "restarts", "preemptions", "backoff_s")


class Decision(NamedTuple):
    """What follows an end: a restart after ``wait_s`` seconds, or none; and why, in words."""

    restart: bool
    wait_s: float
    reason: str


class Budgets:
    """The two budgets. No clock and no process: an end goes in, a decision comes out."""

    def __init__(self, settings: Supervise) -> None:
        self.settings = settings
        self.used = {"restart": 0, "preemption": 0}
        self.in_a_row = 0

    def after(self, code: int, progressed: bool) -> Decision:
        """What follows exit code ``code`` (-N for signal N) of a process that saved something new, or did not."""
        kind = "preemption" if code == PREEMPTED else "restart"
        if code >= 0 and code != PREEMPTED and code not in CRASHES:
            return Decision(False, 0.0, "done" if code == 0 else "a restart would end the same way")
        if progressed:
            self.used, self.in_a_row = dict.fromkeys(self.used, 0), 0
        most = self.settings.preemptions if kind == "preemption" else self.settings.restarts
        if self.used[kind] >= most:
            counted = f"{most} {kind}{'' if most == 1 else 's'} in a row"
            return Decision(False, 0.0, f"{counted} without a new checkpoint, all that --{kind}s allows")
        wait_s = min(self.settings.backoff_s * 2.0 ** min(self.in_a_row, 60), MOST_BACKOFF_S)
        self.used[kind] += 1
        self.in_a_row += 1
        return Decision(True, wait_s, f"{kind} {self.used[kind]} of {most}")


class Runner(Protocol):
    """What starts processes and tells the time."""

    stopped: int
    """The signal that asked this process to stop; 0 for none."""

    def run(self, command: Sequence[str]) -> int:
        """Run ``rlfusion COMMAND`` to its end: its exit code, -N for signal N."""

    def folder(self) -> Path | None:
        """The folder that the last process worked in, if it came that far and the folder is that of a run."""

    def wait(self, seconds: float) -> None:
        """Wait, or until this process is asked to stop."""

    def now(self) -> float:
        """Seconds of a clock."""


def supervise(settings: Supervise, command: Sequence[str], runner: Runner, say: Callable[[str], None]) -> int:
    """Run ``command``, ``finetune ...``, until it ends for good; the exit code. ``say`` is told what happens.

    Raises:
        StopRequested: this process was asked to stop while no command ran.
    """
    budgets, begun, saved = Budgets(settings), list(command), 0
    while True:
        begin = runner.now()
        code = runner.run(command)
        folder = runner.folder()
        now = saved_work(folder)
        told = f"{begun[0]} {ended(code)} after {runner.now() - begin:.0f} s"
        if runner.stopped:
            say(f"{told}, as this supervisor was asked to stop by {SHOWN[signal.Signals(runner.stopped)]}")
            return CODES.get(signal.Signals(runner.stopped), 1) if code == -runner.stopped else shell_code(code)
        decision = budgets.after(code, now > saved)
        saved = max(saved, now)
        if not decision.restart:
            if code:
                say(f"{told}: not restarted, {decision.reason}{_by_hand(begun, folder)}")
            return shell_code(code)
        command = resuming(begun, folder)
        say(f"{told}: {decision.reason}, in {decision.wait_s:g} s: rlfusion {shlex.join(command)}")
        runner.wait(decision.wait_s)
        if runner.stopped:
            stop = StopRequested(runner.stopped, saved > 0)
            stop.left = f"go on with: rlfusion {shlex.join(command)}"
            raise stop


def resuming(command: Sequence[str], folder: Path | None) -> list[str]:
    """The command that goes on with the run in ``folder``. One that resumes already, with changes that may not have
    been made yet, is itself; so is one without a folder.
    """
    if folder is None or any(word.partition("=")[0] == "--resume" for word in command):
        return list(command)
    return [command[0], "--resume", str(folder)]


def saved_work(folder: Path | None) -> int:
    """The work that is saved, as a number that grows with every checkpoint: of the run in ``folder``, of all runs in it
    (a comparison's), and of the base models that are made in the cache beside it.
    """
    if folder is None:
        return 0
    places = [*folder.rglob("checkpoints"), *(folder.parent / "cache").glob("*/checkpoints")]
    results = len(list(folder.rglob("run.json"))) + len(list(folder.rglob("summary.json")))
    return results + sum(_steps(place) for place in places)


def _steps(checkpoints: Path) -> int:
    """The largest step of a folder of checkpoints, by their names."""
    found = [SAVED.fullmatch(path.name) for path in checkpoints.glob("step-*")]
    return max((int(match[1]) for match in found if match), default=0)


def ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-code}"


def shell_code(code: int) -> int:
    """An exit code as a shell has it: 128 + N for signal N."""
    return code if code >= 0 else 128 - code


def _by_hand(command: Sequence[str], folder: Path | None) -> str:
    return f"; go on with: rlfusion {shlex.join(resuming(command, folder))}" if folder is not None else ""


class Processes:
    """The real runner: one process at a time, in a process group of its own, so that a Ctrl-C of the terminal reaches
    it once, through this process. Use it within ``at_hand``.
    """

    def __init__(self, place: Path) -> None:
        self.stopped = 0
        self._told = place / "folder"
        self._child: subprocess.Popen | None = None
        self._asked = threading.Event()

    def stop(self, number: int, _: object = None) -> None:
        """Hand a signal on; the handler of this process's signals."""
        self.stopped = self.stopped or number
        self._asked.set()
        if self._child is not None:
            self._child.send_signal(number)

    def run(self, command: Sequence[str]) -> int:
        """As ``Runner.run``."""
        environment = os.environ | {RUN_FILE: str(self._told)}
        whole = [sys.executable, "-P", "-m", "rlfusion", *command]
        self._child = subprocess.Popen(whole, process_group=0, env=environment, preexec_fn=_die_together(os.getpid()))
        if self.stopped:  # between the fork and the line above it had nobody to go to
            self._child.send_signal(self.stopped)
        try:
            return self._child.wait()
        finally:
            self._child = None

    def folder(self) -> Path | None:
        """As ``Runner.folder``; a folder that was made and holds nothing yet is removed, to be made again."""
        folder = Path(self._told.read_text()) if self._told.is_file() else None
        if folder is None or (folder / "config.yaml").is_file() or (folder / "run.json").is_file():
            return folder
        discard(folder)
        return None

    def wait(self, seconds: float) -> None:
        """As ``Runner.wait``."""
        self._asked.wait(seconds)

    def now(self) -> float:
        """As ``Runner.now``."""
        return time.monotonic()


@contextmanager
def at_hand() -> Iterator[Processes]:
    """A runner that has this process's signals."""
    place = Path(tempfile.mkdtemp(prefix="rlf-supervise-"))
    runner = Processes(place)
    before = {number: signal.signal(number, runner.stop) for number in CODES}
    try:
        yield runner
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(place, ignore_errors=True)


def _die_together(parent: int) -> Callable[[], None] | None:
    """What a new process does first: ask the kernel for a SIGTERM when ``parent`` dies. Only Linux has this."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
