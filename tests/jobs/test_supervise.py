"""A supervised run: its policy with processes and a clock of the test's own, and one that is really killed."""

import os
import random
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from interrupted_runs import Job, assert_same, outcome, place
from processes import Process
from tiny_runs import TINY

from rlfusion.cli.main import main
from rlfusion.cli.words import RESUMABLE
from rlfusion.common.stops import StopRequested
from rlfusion.jobs.supervise import MOST_BACKOFF_S, Budgets, Supervise, resuming, saved_work, supervise

COMMAND = ["finetune", "--reward", "ink"]
FINAL, CRASHED = (0, 2, 3, 4, 130), (1, 69, 74, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGTERM)


class Script:
    """Processes that end as they are told to: (exit code, the newest checkpoint, or None for no folder)."""

    def __init__(
        self, folder: Path, *ends: tuple[int, int | None], stop_in: int = 0, stop_while_waiting: int = 0
    ) -> None:
        self.place, self.ends = folder, list(ends)
        self.stop_in, self.stop_while_waiting = stop_in, stop_while_waiting
        self.stopped, self.time, self.begun, self.commands, self.waits = 0, 0.0, False, [], []

    def run(self, command):
        self.commands.append(list(command))
        code, step = self.ends.pop(0)
        self.time += 60
        if step is not None:
            self.begun = True
            (self.place / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        if self.stop_in == len(self.commands):
            self.stopped = signal.SIGTERM
        return code

    def folder(self):
        return self.place if self.begun else None

    def wait(self, seconds):
        self.waits.append(seconds)
        self.time += seconds
        self.stopped = self.stop_while_waiting if len(self.waits) == 1 else self.stopped

    def now(self):
        return self.time


def run(script: Script, said: list[str] | None = None, **settings: float) -> int:
    return supervise(Supervise(**settings), COMMAND, script, [].append if said is None else said.append)


@pytest.mark.parametrize("code", FINAL)
def test_an_end_for_good_is_not_restarted(tmp_path, code):
    script = Script(tmp_path / "it", (code, 3))
    assert run(script) == code
    assert script.commands == [COMMAND]


@pytest.mark.parametrize("code", [*CRASHED, 75])
def test_a_death_is_resumed(tmp_path, code):
    script = Script(tmp_path / "it", (code, 3), (0, 6))
    assert run(script) == 0
    assert script.commands == [COMMAND, ["finetune", "--resume", str(tmp_path / "it")]]


def test_every_exit_code_of_the_table_is_decided():
    table = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text().partition("## Exit codes")[2]
    codes = {int(line.split("|")[1]) for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()}
    assert codes == {*FINAL, *(code for code in CRASHED if code > 0), 75}


def test_without_a_folder_it_begins_again(tmp_path):
    script = Script(tmp_path / "it", (-9, None), (-9, 1), (0, 6))
    assert run(script) == 0
    assert script.commands == [COMMAND, COMMAND, ["finetune", "--resume", str(tmp_path / "it")]]


def test_a_resume_is_repeated_as_it_is():
    """Its changes may not have been recorded when it died."""
    command = ["finetune", "--resume=runs/it", "--change", "updates=9"]
    assert resuming(command, Path("/runs/it")) == command


@pytest.mark.parametrize(("code", "name"), [(1, "restarts"), (-9, "restarts"), (75, "preemptions")])
def test_a_budget_ends(tmp_path, code, name):
    said = []
    script = Script(tmp_path / "it", *[(code, 3)] * 4)
    assert run(script, said, **{name: 3}) == (137 if code < 0 else code)
    assert len(script.commands) == 4
    assert f"3 {name} in a row without a new checkpoint, all that --{name} allows" in said[-1]
    assert f"rlfusion finetune --resume {tmp_path / 'it'}" in said[-1]


def test_a_budget_of_none_restarts_nothing(tmp_path):
    script = Script(tmp_path / "it", (69, 3))
    assert run(script, restarts=0) == 69


def test_progress_fills_both_budgets_and_shortens_the_wait(tmp_path):
    ends = [(-9, 1), (75, 1), (-9, 1), (-9, 2), (75, 2), (-9, 3), (0, 4)]
    script = Script(tmp_path / "it", *ends)
    assert run(script, restarts=2, preemptions=1, backoff_s=1.0) == 0
    assert script.waits == [1, 2, 4, 1, 2, 1]


def test_without_progress_the_same_ends(tmp_path):
    script = Script(tmp_path / "it", (-9, 1), (75, 1), (-9, 1), (-9, 1))
    assert run(script, restarts=2, preemptions=1, backoff_s=1.0) == 137


def test_budgets_are_apart():
    """Each is spent to its end, whatever the order."""
    draw = random.Random(0)
    for _ in range(50):
        budgets, left = Budgets(Supervise(restarts=3, preemptions=4, backoff_s=0)), {1: 3, 75: 4}
        while True:
            code = draw.choice([1, 75])
            assert budgets.after(code, False).restart == (left[code] > 0)
            if not left[code]:
                break
            left[code] -= 1


def test_waits_grow_to_a_limit():
    budgets = Budgets(Supervise(restarts=2000, backoff_s=5.0))
    waits = [budgets.after(1, False).wait_s for _ in range(2000)]
    assert waits[:4] == [5, 10, 20, 40]
    assert max(waits) == waits[-1] == MOST_BACKOFF_S
    assert all(a <= b for a, b in pairwise(waits))


def test_a_stop_is_not_restarted(tmp_path):
    script = Script(tmp_path / "it", (75, 3), stop_in=1)
    assert run(script) == 75
    before_its_handlers_stood = Script(tmp_path / "it", (-signal.SIGTERM, 3), stop_in=1)
    assert run(before_its_handlers_stood) == 75


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_between_two_processes_says_how_to_go_on(tmp_path, number, code):
    script = Script(tmp_path / "it", (-9, 3), stop_while_waiting=number)
    with pytest.raises(StopRequested) as stop:
        run(script)
    assert stop.value.exit_code == code
    assert stop.value.left == f"go on with: rlfusion finetune --resume {tmp_path / 'it'}"


def test_each_thing_that_happens_is_said_in_a_line(tmp_path):
    said = []
    script = Script(tmp_path / "my run", (-9, 3), (69, 4), (2, 4))
    assert run(script, said) == 2
    resumed = f"rlfusion finetune --resume '{tmp_path / 'my run'}'"
    assert said == [
        f"finetune was killed by SIGKILL after 60 s: restart 1 of 5, in 5 s: {resumed}",
        f"finetune ended with exit code 69 after 60 s: restart 1 of 5, in 5 s: {resumed}",
        f"finetune ended with exit code 2 after 60 s: not restarted, a restart would end the same way; "
        f"go on with: {resumed}",
    ]


def test_saved_work_grows_with_checkpoints_of_runs_inside_and_of_the_base(tmp_path):
    run_folder = tmp_path / "it"
    found = [saved_work(None), saved_work(run_folder)]
    for made in (
        "it/checkpoints/step-00000003",
        "it/ddpo-ink/checkpoints/step-00000002",
        "cache/base-1/checkpoints/step-2",
    ):
        (tmp_path / made).mkdir(parents=True)
        found.append(saved_work(run_folder))
    assert found == [0, 0, 3, 5, 7]
    for no_checkpoint in (
        "it/checkpoints/step-00000009.corrupt",
        "it/checkpoints/.step-00000009.part",
        "other/checkpoints/step-9",
    ):
        (tmp_path / no_checkpoint).mkdir(parents=True)
    assert saved_work(run_folder) == 7


@pytest.mark.parametrize("command", RESUMABLE)
def test_every_command_that_makes_a_run_is_taken(monkeypatch, command):
    taken = []
    monkeypatch.setattr(
        "rlfusion.jobs.supervise.supervise", lambda settings, command, *_: taken.append((settings, command))
    )
    assert main(["supervise", "--restarts", "2", "--", command, "--name", "it"]) == 0
    assert taken == [(Supervise(restarts=2), [command, "--name", "it"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], "expected -- and a command, as in rlfusion supervise -- finetune"),
        (["--"], "expected -- and a command"),
        (["--", "finetun"], "did you mean 'finetune'?"),
        (["--", "sample"], "unknown command that makes a run 'sample'"),
        (["--restart", "2", "--", "finetune"], "did you mean 'restarts'?"),
        (["--restarts", "-1", "--", "finetune"], "restarts = -1: expected a number >= 0"),
        (["--backoff_s", "nan", "--", "finetune"], "backoff_s"),
    ],
)
def test_what_cannot_be_supervised_is_refused(capsys, arguments, message):
    assert main(["supervise", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def hit(job: Job, supervisor: Process, number: int, least: str) -> int:
    """Send a signal to the driver once it is there and the checkpoint ``least`` is saved; whether it was sent."""
    while supervisor.process.is_alive():
        with suppress(psutil.NoSuchProcess):
            drivers = psutil.Process(supervisor.process.pid).children()
            if drivers and (not least or (job.checkpoints() or [""])[-1] >= least):
                os.kill(drivers[0].pid, number)
                return 1
        time.sleep(0.01)
    return 0


@pytest.mark.alone
def test_a_driver_killed_at_random_moments_ends_in_the_same_bits(tiny_root, tmp_path):
    """SIGKILL, three times; one SIGTERM from outside, which counts as a preemption; then a stop of the supervisor."""
    settings = (*TINY, "--reward", "meddling:brightness", "--updates", 8, "--checkpoint_every", 1)
    calm = place(tmp_path / "calm", tiny_root / "cache", "finetune", *settings)
    assert calm.start().wait().code == 0
    job = place(tmp_path / "hit", tiny_root / "cache", "finetune", *settings)
    supervisor = Process(
        *(job.cwd, "supervise", "--backoff_s", "0.1", "--", "finetune", *settings, "--root", "runs", "--name", "it")
    )
    draw, killed = random.Random(15), 0
    for number, least in zip((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), ("", "1", "3", "5")):
        time.sleep(draw.uniform(0.1, 0.6))
        killed += hit(job, supervisor, number, f"step-{least:0>8}" if least else "")
    result = supervisor.wait()
    assert result.code == 0, result.err
    assert killed >= 2, "the run was too short to be killed"
    assert result.err.count("rlfusion supervise: ") == killed
    assert_same(job, outcome(calm.folder))


@pytest.mark.alone
def test_a_stop_reaches_the_driver_and_a_dead_supervisor_takes_it_along(tiny_root, tmp_path):
    settings = (*TINY, "--updates", 5000, "--checkpoint_every", 1)
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        job = place(tmp_path / number.name, tiny_root / "cache", "finetune", *settings)
        supervisor = Process(job.cwd, "supervise", "--", "finetune", *settings, "--root", "runs", "--name", "it")
        deadline = time.monotonic() + 300
        while not job.checkpoints() and time.monotonic() < deadline:
            time.sleep(0.05)
        (driver,) = psutil.Process(supervisor.process.pid).children()
        supervisor.signal(number)
        assert supervisor.wait().code == code
        driver.wait(60)
        told = supervisor.err.read_text()
        assert "go on with: rlfusion finetune --resume" in told, "the driver was killed, not asked to stop"
