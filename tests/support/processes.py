"""Real ``rlfusion`` processes for the tests, without the seconds that importing torch takes in each.

A fork server imports everything once; each ``Process`` is a fork of it that runs ``rlfusion.cli.main`` in its own
working directory, and can be killed as any process can.
"""

import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PATIENCE = 400.0
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""The addresses of the loopback, as ``listening`` gives them."""
PRELOAD = [
    "PIL.Image",
    "jsonargparse",
    "open_clip",
    "peft",
    "rich.progress",
    "rlfusion.cli.main",
    "rlfusion.cli.tables",
    "sklearn.datasets",
    "torch.utils.tensorboard.summary",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


class Result(NamedTuple):
    """How a process ended: its exit code (-N for signal N), and what it printed."""

    code: int
    out: str
    err: str


def _main(arguments: list[str], cwd: str, out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.chdir(cwd)
    from rlfusion.cli.main import main

    sys.exit(main(arguments))


class Process:
    """``rlfusion ARGUMENTS`` in ``cwd``, started."""

    count = 0

    def __init__(self, cwd: Path, *arguments: object) -> None:
        Process.count += 1
        self.out, self.err = (cwd / f".{name}-{os.getpid()}-{Process.count}" for name in ("out", "err"))
        texts = ([str(a) for a in arguments], str(cwd), str(self.out), str(self.err))
        self.process = CONTEXT.Process(target=_main, args=texts)
        self.process.start()

    def wait(self, patience: float = PATIENCE) -> Result:
        """Its end."""
        self.process.join(patience)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {patience:g} s; stderr: {self.err.read_text()}")
        return Result(self.process.exitcode, self.out.read_text(), self.err.read_text())

    def once(self, reached: Callable[[], bool], number: int) -> "Process":
        """Send signal ``number`` as soon as ``reached()``."""
        deadline = time.monotonic() + PATIENCE
        while self.process.is_alive() and not reached() and time.monotonic() < deadline:
            time.sleep(0.002)
        self.signal(number)
        return self

    def after(self, seconds: float, number: int) -> Result:
        """Send signal ``number`` after ``seconds`` unless it has ended by then, and wait for the end."""
        self.process.join(seconds)
        self.signal(number)
        return self.wait()

    def signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)


def rlfusion(cwd: Path, *arguments: object) -> Result:
    """Run a command to its end."""
    return Process(cwd, *arguments).wait()


def kill_until_done(
    start: Callable[[], Process], resume: Callable[[], Process], seed: int, least: int, longest: float, number: int
) -> int:
    """Signal ``number`` at ``least`` seeded random moments, then let it end. Returns how often it hit."""
    draw, hits, process = random.Random(seed), 0, start()
    while hits < least:
        result = process.after(draw.uniform(0.0, longest), number)
        if result.code == 0:
            break
        hits += 1
        process = resume()
    result = process.wait()
    assert result.code == 0, result.err
    return hits


def descendants() -> set[int]:
    """This process and all below it, from /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return found


def listening() -> list[str]:
    """The addresses, in the kernel's hexadecimal, at which this process and those below it listen by TCP."""
    inodes = set()
    for pid in descendants():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
            except (FileNotFoundError, PermissionError):
                continue
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def titled(title: str) -> list[int]:
    """The processes below this one whose title begins so, the newest last."""
    found = []
    for pid in sorted(descendants()):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
