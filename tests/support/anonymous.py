"""How much memory of its own a process holds at most, beside what it had before."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Have the C library give memory back to the system as it is freed, in blocks of 64 kB and more."""
    ctypes.CDLL(None).mallopt(-3, 2**16)


@contextmanager
def peak(found: dict[str, int], name: str) -> Iterator[None]:
    """Within the context ``found[name]`` is the most that is held beside what is there now, looked at each ms."""
    before, done = anonymous(), threading.Event()
    found[name] = 0

    def look() -> None:
        while not done.wait(0.001):
            found[name] = max(found[name], anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found[name] = max(found[name], anonymous() - before)
