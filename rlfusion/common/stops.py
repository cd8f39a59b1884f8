"""Stopping by Ctrl-C (SIGINT) and SIGTERM, at every moment of a process.

    before work begins        the process ends at once, with one line; a folder that holds nothing is removed
    while ``Signals`` holds   the step is finished and saved first (``Signals.hold``)
    else, at work             ``StopRequested`` is raised at once: what is saved is whole, and resuming repeats the rest

A library that swallows exceptions while it is imported could swallow ``StopRequested`` too: inside of an import the
process is ended directly, and a stop that was raised and did not arrive ends it after ``LAST_RESORT_S``.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
SHOWN = {signal.SIGINT: "Ctrl-C (SIGINT)", signal.SIGTERM: "SIGTERM"}
LAST_RESORT_S = 15.0
NOTHING = "nothing was saved"


class StopRequested(BaseException):
    """A signal asked to stop; what is saved is whole. No ``Exception``, so that nobody takes it for a failure.

    Attributes:
        saved: whether work of this process was saved.
        left: what is left behind, in words.
    """

    def __init__(self, number: int, saved: bool = False) -> None:
        super().__init__(number)
        self.number, self.saved, self.left = signal.Signals(number), saved, NOTHING

    def __str__(self) -> str:
        return SHOWN[self.number]

    @property
    def exit_code(self) -> int:
        """The exit code of the command that the signal ends: 75 or 130."""
        return CODES[self.number]

    def arrived(self) -> None:
        """It is where it is answered: the process need not be ended the hard way."""
        if Entry.current is not None:
            Entry.current.arrived()


class Entry:
    """The signals of a process whose only purpose is one command, from its first line on.

    Attributes:
        leaving: each is called with whether work was saved when the process ends at once, and says what is left.
        stopping: a stop that was raised and has not arrived yet.
    """

    current: "Entry | None" = None

    def __init__(self) -> None:
        self.leaving: list[Callable[[bool], str]] = []
        self.stopping: StopRequested | None = None
        self._timer: threading.Timer | None = None

    def install(self) -> dict[signal.Signals, object]:
        """Take over both signals, where this is the thread that may; the handlers that were there."""
        Entry.current = self
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self.quit) for number in CODES}

    def restore(self, handlers: dict[signal.Signals, object]) -> None:
        """Put back what ``install`` gave."""
        Entry.current = None
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def quit(self, number: int, _: FrameType | None = None) -> None:
        """End the process now, with one line. Nothing above it on the stack can keep it from doing so."""
        for other in CODES:
            signal.signal(other, signal.SIG_IGN)
        self.end(f"stopped by {SHOWN[signal.Signals(number)]}", CODES[signal.Signals(number)])

    def end(self, why: str, code: int) -> None:
        """End the process now, whatever its threads do, with one line: why, and what is left."""
        saved = bool(Signals.current and Signals.current.saved)
        messages = [text for leave in reversed(self.leaving) if (text := leave(saved))] or [NOTHING]
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
        os.write(2, f"{cursor}rlfusion: {why}; {'; '.join(messages)}\n".encode())
        os._exit(code)

    def expect(self, stop: StopRequested) -> None:
        """A stop is raised: end the process where it does not arrive."""
        self.stopping = stop
        self._timer = threading.Timer(LAST_RESORT_S, self._last_resort, (stop.number,))
        self._timer.daemon = True
        self._timer.start()

    def arrived(self) -> None:
        """What was expected is here."""
        self.stopping = None
        if self._timer is not None:
            self._timer.cancel()

    def _last_resort(self, number: int) -> None:
        os.write(2, f"rlfusion: stopped by {SHOWN[signal.Signals(number)]}, the hard way\n".encode())
        os._exit(CODES[signal.Signals(number)])


def end_now(why: str, code: int) -> bool:
    """End the process, as ``Entry.end``; False where its purpose is not one command."""
    if Entry.current is None:
        return False
    Entry.current.end(why, code)
    return True


@contextmanager
def leaving(say: Callable[[bool], str]) -> Iterator[None]:
    """Within the context a process that ends at once calls ``say(work was saved)``: what is left behind, in words."""
    entry = Entry.current or Entry()
    entry.leaving.append(say)
    try:
        yield
    finally:
        entry.leaving.remove(say)


@contextmanager
def blocked() -> Iterator[None]:
    """Within the context no signal is delivered; it waits for the end. For a few system calls that belong together."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


class Signals:
    """Within the context SIGTERM and SIGINT raise ``StopRequested``, or, while work is held, only set ``requested``.

    A second SIGINT does what it did outside of the context: it ends the command at once.

    Attributes:
        requested: the name of the signal that came, or "".
        saved: whether work was saved in the context.
    """

    current: "Signals | None" = None

    def __init__(self) -> None:
        self.requested, self.saved = "", False
        self._number, self._held = 0, False

    def __enter__(self) -> "Signals":
        self._outer, Signals.current = Signals.current, self
        self._old = {number: signal.signal(number, self._note) for number in CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        Signals.current = self._outer

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.requested)
        if not again:
            self._number, self.requested = number, signal.Signals(number).name
        if number == signal.SIGINT and again and callable(self._old[signal.SIGINT]):
            self._old[signal.SIGINT](number, frame)
        if self._held:
            told = f"rlfusion: {SHOWN[signal.Signals(number)]}: stops once this step is done and saved"
            os.write(2, b"" if again else f"\n{told}; Ctrl-C again ends it at once\n".encode())
        elif not again:
            self._raise(frame)

    def _raise(self, frame: FrameType | None) -> None:
        entry = Entry.current
        if entry is not None and _importing(frame):
            entry.quit(self._number)
        stop = StopRequested(self._number, self.saved)
        if entry is not None:
            entry.expect(stop)
        raise stop

    def check(self) -> None:
        """Raise StopRequested if a signal came."""
        if self.requested:
            raise StopRequested(self._number, self.saved)

    def hold(self, work: bool) -> None:
        """There is work that is not saved yet, or there is none any more; then ``check`` says whether to stop."""
        self._held = work

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Within the context a signal raises StopRequested at once, although work is held: the holder saves it."""
        self.check()
        held, self._held = self._held, False
        try:
            yield
        finally:
            self._held = held


def in_force() -> Signals:
    """The ``Signals`` of this process; one that hears of no signal where there are none."""
    return Signals.current or Signals()


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
