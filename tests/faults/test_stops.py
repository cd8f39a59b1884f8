"""Ctrl-C and SIGTERM at every moment: while libraries are imported, before, during and after work that can be saved."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rlfusion.common.stops import Entry, Signals, StopRequested, in_force
from rlfusion.training.loop import train

SWALLOWS = """
import os, time
open("importing", "w").close()
for _ in range(100):
    try:
        time.sleep(0.1)
    except BaseException:
        open("swallowed", "w").close()
raise RecursionError("much later")
"""
COMMAND = "import sys; from rlfusion.cli.main import main; sys.exit(main())"


def started(cwd: Path, *arguments: str) -> subprocess.Popen:
    """``rlfusion ARGUMENTS`` where torch is a stand-in whose import takes long and swallows every exception."""
    (cwd / "torch.py").write_text(SWALLOWS)
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], cwd=cwd, env=environment, stderr=subprocess.PIPE
    )


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.alone
@pytest.mark.parametrize(("number", "code", "said"), [("SIGINT", 130, "Ctrl-C (SIGINT)"), ("SIGTERM", 75, "SIGTERM")])
@pytest.mark.parametrize("command", ["finetune", "sample"])
def test_within_an_import_that_swallows_exceptions_it_ends_at_once_with_one_line(tmp_path, number, code, said, command):
    process = started(tmp_path, command)
    wait_for(tmp_path / "importing")
    begin = time.monotonic()
    process.send_signal(getattr(signal, number))
    error = process.communicate(timeout=60)[1].decode()
    assert (process.returncode, error) == (code, f"rlfusion: stopped by {said}; nothing was saved\n")
    assert time.monotonic() - begin < 5
    assert not (tmp_path / "swallowed").exists()
    assert not (tmp_path / "runs").exists()


class Counting:
    """A learner whose updates are counted; ``at`` of them are told to ``hook`` before they are done."""

    def __init__(self, hook) -> None:
        self.hook, self.done = hook, 0

    def update(self, batch: int) -> dict[str, float]:
        self.hook(batch)
        self.done += 1
        return {"loss": 0.0}


def trained(hook, every: int = 3, total: int = 7, after=lambda step: None) -> tuple[list[int], StopRequested | None]:
    """The steps at which a training was saved, each with what the learner had done, and what stopped it."""
    learner, saved = Counting(hook), []

    def save(step: int) -> None:
        assert learner.done == step
        saved.append(step)

    with Signals() as signals:
        try:
            for step, _ in train(learner, iter(range(total)), 0, total, every, save, signals):
                after(step)
        except StopRequested as stop:
            return saved, stop
    return saved, None


def at(step: int, number: int):
    return lambda now: os.kill(os.getpid(), number) if now == step else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("step", "saved"),
    [
        (0, []),  # nothing is done: at once
        (1, [2]),  # the step is finished, then saved
        (3, [3]),  # all is saved: at once
        (4, [3, 5]),
        (6, [3, 6]),
    ],
)
def test_a_signal_within_an_update_saves_what_is_not_saved_yet(number, step, saved, capfd):
    found, stop = trained(at(step, number))
    assert (found, stop.number, stop.saved) == (saved, number, bool(saved))
    held = step % 3 > 0
    assert ("stops once this step is done and saved" in capfd.readouterr().err) == held


def test_a_signal_after_the_last_update_stops_too():
    saved, stop = trained(lambda step: None, after=at(6, signal.SIGTERM))
    assert (saved, stop.number) == ([3, 6, 7], signal.SIGTERM)


def test_a_stop_that_work_without_an_update_lets_through_saves_the_updates_before():
    def pairs(step: int) -> None:
        if step == 4:
            with in_force().prompt():
                os.kill(os.getpid(), signal.SIGTERM)

    saved, stop = trained(pairs)
    assert (saved, stop.saved) == ([3, 4], True)


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    def twice(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a process in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            trained(twice)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_that_was_swallowed_is_raised_again_where_training_begins():
    with Signals() as signals:
        with suppress(BaseException):  # what some libraries do
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            next(train(Counting(lambda step: None), iter(range(3)), 0, 3, 3, lambda step: None, signals))


def test_code_that_catches_every_failure_does_not_catch_a_stop():
    def careless(step: int) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            raise AssertionError("caught") from None

    saved, stop = trained(careless)
    assert (saved, stop.saved) == ([], False)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    entry = Entry()
    handlers = entry.install()
    with Signals():
        assert Signals.current is in_force()
    entry.restore(handlers)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert Entry.current is None is Signals.current
