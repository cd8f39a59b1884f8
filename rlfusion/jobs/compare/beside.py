"""Runs side by side: each a process of its own (``rlfusion.cli.member``), as many at once as there is room for, on this
machine or on the nodes of a Ray cluster (``placed``).

A stop is handed to all: each saves its work and ends, and resuming goes on with them. A run that dies leaves the others
alone. It goes on from its newest checkpoint, so often in a row without a new one (``supervise.Budgets``); then it is
told in the report, and run again when the comparison is resumed.
"""

import os
import resource
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, NumericalError, UnavailableError, UserCodeError, shorten
from rlfusion.common.logs import last_line
from rlfusion.common.progress import Progress
from rlfusion.common.stops import CODES, Signals
from rlfusion.config.compare import Compare
from rlfusion.jobs.compare.members import Member
from rlfusion.jobs.compare.watching import HEAD, Watching
from rlfusion.jobs.supervise import Budgets, Supervise, ended, saved_work
from rlfusion.training.devices import pick_device

SAYS = "rlfusion: "
"""How the line begins with which a run ends."""
MEMBER = ("-P", "-m", "rlfusion.cli.member")
"""What Python is told to do a run with, its folder behind it."""
LOGS = "logs"
POLL_S = 0.25
LONGEST_SAID, MOST_TOLD = 200, 3
"""Characters of what a run that died has said, and how many such runs the error names."""
NEEDS = 1.25
"""A run's memory in that of this process, which has measured the base model."""


def room(config: Compare) -> int:
    """How many runs at once; on a cluster, which places those itself that it has room for, all."""
    if config.ray.address and config.side_by_side == "auto":
        return len(list(config.runs()))
    if config.side_by_side != "auto":
        return config.side_by_side
    if pick_device(config.device).type == "cuda":
        return max(1, len(_gpus()))
    own = NEEDS * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    fitting = [_processors() // (config.threads + config.rollout.workers), int(_memory() // own)]
    return max(1, min(fitting))


def _processors() -> int:
    """Those that this process may use."""
    held = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return held if quota == "max" else max(1, min(held, int(quota) // int(period)))
    except (OSError, ValueError):
        return held


def _memory() -> float:
    """Bytes that are free, or could be; without end where nothing says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if (told := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in told.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


class Work(Protocol):
    """A run that was begun somewhere."""

    member: Member

    @property
    def begun(self) -> bool:
        """Whether it is at work; else it waits for its place."""

    def ended(self, stopped: bool) -> bool:
        """Whether it has ended; then its member knows how. ``stopped``: it was asked to."""

    def stop(self) -> None:
        """Ask it to save its work and to end."""

    def kill(self) -> None:
        """End it at once, if it has not ended, and wait for that."""


Begin = Callable[[Member, int, Path], Work]
"""Begins a run, at one of the places 0, 1, ... of those at work, with the folder of the logs."""


@dataclass
class Process:
    """A run in a process of this machine, and where in its log what it says begins."""

    member: Member
    process: subprocess.Popen
    log: Path
    begin: int
    begun: bool = True

    @classmethod
    def start(cls, member: Member, place: int, logs: Path) -> "Process":
        """On the GPU of this place, where the run takes one and there are several."""
        file = log_of(member, logs)
        environment = dict(os.environ)
        if pick_device(member.settings.device).type == "cuda" and (gpus := _gpus()):
            environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
        command = [sys.executable, *MEMBER, str(member.folder)]
        with file.open("ab") as log:  # a Ctrl-C of the terminal reaches it through this process alone
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, process_group=0
            )
            return cls(member, process, file, log.tell())

    def ended(self, stopped: bool) -> bool:
        """As ``Work.ended``."""
        code = self.process.poll()
        if code is None:
            return False
        assert self.process.stdin is not None
        self.process.stdin.close()
        tell(self.member, code, last_line(self.log, self.begin, SAYS), stopped)
        return True

    def stop(self) -> None:
        """As ``Work.stop``."""
        self.process.terminate()

    def kill(self) -> None:
        """As ``Work.kill``."""
        self.process.kill()
        self.process.wait()


def log_of(member: Member, logs: Path) -> Path:
    """Where what a run says is kept."""
    return logs / f"{member.folder.name}.log"


def tell(member: Member, code: int, last: str, stopped: bool) -> None:
    """Let a member know how its process ended: its exit code, and the last line that it said."""
    said = last.removeprefix(SAYS)
    if code == ConfigError.exit_code:
        member.refused(said)
    elif code == NumericalError.exit_code:
        member.problem = f"failed: {said.removeprefix(f'{NumericalError.kind}: ')}"
    elif stopped and code in CODES.values():
        member.problem = "stopped"
    elif code != 0:
        told = f"; {shorten(said, LONGEST_SAID)}" if said else ""
        member.code, member.problem = code, f"died: it {ended(code)}{told}"


@dataclass
class Again:
    """Which of the runs that died go on, and how often."""

    restarts: int = 0
    budgets: dict[Path, Budgets] = field(default_factory=dict)
    saved: dict[Path, int] = field(default_factory=dict)

    def begins(self, member: Member) -> None:
        """A run begins, with what it has saved."""
        self.saved[member.folder] = saved_work(member.folder)

    def after(self, member: Member) -> str:
        """How a run that died is to go on, in words, and then its member has forgotten it; "" where it is not."""
        if member.code is None:
            return ""
        settings = Supervise(self.restarts, self.restarts, 0.0)
        budgets = self.budgets.setdefault(member.folder, Budgets(settings))
        decision = budgets.after(member.code, saved_work(member.folder) > self.saved[member.folder])
        if not decision.restart:
            return ""
        problem, member.problem, member.code = member.problem, "", None
        return f"{problem}: {decision.reason}, from its newest checkpoint"


def run(
    members: Sequence[Member],
    room: int,
    logs: Path,
    signals: Signals,
    progress: Progress,
    restarts: int = 0,
    begin: Begin = Process.start,
) -> None:
    """Do the runs that are not finished, up to ``room`` at once; what each says goes to a file of ``logs``.

    Raises:
        StopRequested: a signal came; all runs have ended, their work saved.
    """
    waiting, running, stopped, again = deque(members), dict[int, Work](), False, Again(restarts)
    storage.make_folder(logs)
    progress.say(f"{len(members)} runs, {room} side by side; what each says is in {logs}")
    signals.hold(True)  # a stop is for the runs to answer
    try:
        with progress.rows(*HEAD) as rows:
            watching = Watching(len(members), progress, rows)
            while running or (waiting and not signals.requested):
                while waiting and len(running) < room and not signals.requested:
                    member = waiting.popleft()
                    if member.done or not member.ready(progress):
                        watching.ended(member)
                        continue
                    again.begins(member)
                    place = min(set(range(room)) - running.keys())
                    running[place] = begin(member, place, logs)
                if signals.requested and not stopped:
                    stopped = True
                    for one in running.values():
                        one.stop()
                for place in [place for place, one in running.items() if one.ended(stopped)]:
                    member = running.pop(place).member
                    if not stopped and (told := again.after(member)):
                        progress.say(f"{member}: {told}")
                        waiting.appendleft(member)
                    else:
                        watching.ended(member)
                watching.show([one.member for one in running.values() if one.begun])
                time.sleep(POLL_S)
    finally:
        for one in running.values():  # an error of ours
            one.kill()
        signals.hold(False)
    signals.check()


def require_ended(members: Sequence[Member], folder: Path) -> None:
    """Raise an error where runs have died: the report is there, without what they would have had.

    Raises:
        UserCodeError: the user's own code raised, in all of them.
        UnavailableError: a process was killed, or lost what it needs.
    """
    died = [member for member in members if member.code is not None]
    if not died:
        return
    told = "; ".join(f"{member}: {shorten(member.problem, LONGEST_SAID)}" for member in died[:MOST_TOLD])
    more = f"; and {len(died) - MOST_TOLD} more" if len(died) > MOST_TOLD else ""
    again = f"rlfusion compare --resume {shlex.quote(str(folder))}"
    kind = UserCodeError if {member.code for member in died} == {UserCodeError.exit_code} else UnavailableError
    raise kind(
        f"{len(died)} of {len(members)} runs died ({told}{more}); the report has the others, and {again} tries again"
    )
