"""Runs of a comparison side by side: the same bits, what is told of them, and how they are stopped and go on."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from stand_in_members import Standing, maker, said
from tiny_runs import TINY

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError, UnavailableError, UserCodeError
from rlfusion.common.stops import Signals, StopRequested
from rlfusion.config import Compare, Finetune
from rlfusion.jobs.compare import beside
from rlfusion.jobs.compare.members import Member
from rlfusion.jobs.compare.watching import HEAD, Sight, Watching, row
from rlfusion.training.deciding import digest, flat

SMALL = [*TINY[: TINY.index("--updates")], *TINY[TINY.index("--rollout.prompts") : TINY.index("--agent.micro_batch")]]
FEW = ["--budget_queries", 48, "--evaluations", 1, "--evaluation.samples", 60, "--guidance", "[]", "--best_of", "[]"]


@pytest.fixture
def standing(tmp_path, monkeypatch):
    """``standing(line, line)``: runs that do these lines."""
    return maker(tmp_path, monkeypatch)


def run(members: list[Standing], room: int, tmp_path: Path) -> str:
    progress, text = said()
    with Signals() as signals:
        beside.run(members, room, tmp_path / "logs", signals, progress)
    return text.getvalue()


def test_as_many_at_once_as_there_is_room_for(standing, tmp_path):
    meet = "while not (folder.parent / 'run-{}' / 'begun').exists(): time.sleep(0.02)"
    members = standing(meet.format(1), meet.format(0), *["time.sleep(0.3)"] * 3)
    told = run(members, 2, tmp_path)
    spans = [(one.time("begun"), one.time("ended")) for one in members]
    at_once = [sum(begin <= at < end for begin, end in spans) for at, _ in spans]
    assert max(at_once) == 2
    assert "5 runs, 2 side by side" in told
    assert "[5/5]" in told


def test_how_a_run_ends_is_told_and_stops_no_other(standing, tmp_path):
    members = standing(
        "print('rlfusion: lr = 9: expected less', file=sys.stderr); sys.exit(2)",
        "print('rlfusion: numerical failure: the loss is nan', file=sys.stderr); sys.exit(4)",
        "import os; os.kill(os.getpid(), signal.SIGKILL)",
        "pass",
        "print('rlfusion: your code failed: boom', file=sys.stderr); sys.exit(3)",
        "sys.exit(75)",
    )
    run(members, 3, tmp_path)
    problems = [member.problem for member in members]
    assert problems[:2] == ["refused: lr = 9: expected less", "failed: the loss is nan"]
    assert problems[2] == "died: it was killed by SIGKILL"
    assert problems[3] == ""
    assert problems[4:] == [
        "died: it ended with exit code 3; your code failed: boom",
        "died: it ended with exit code 75",  # somebody else stopped it
    ]
    with pytest.raises(
        UnavailableError, match=r"3 of 6 runs died \(a2 on ink, seed 2: died: it was killed by SIGKILL;.*"
    ) as told:
        beside.require_ended(members, tmp_path / "it")
    assert "rlfusion compare --resume" in str(told.value)
    with pytest.raises(UserCodeError, match="1 of 2 runs died"):
        beside.require_ended(members[3:5], tmp_path / "it")
    beside.require_ended(members[:2], tmp_path / "it")
    for member in members:  # as a resumed comparison has them
        member.problem, member.code = "", None
        (member.folder / "does").write_text("pass")
    begun = {member.folder: member.time("begun") for member in members}
    run(members, 2, tmp_path)
    assert all(member.done and not member.problem for member in members)
    assert [member.time("begun") == begun[member.folder] for member in members] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


ONCE = "once = folder / 'once'; first = not once.exists(); once.touch(); "


def test_a_run_that_dies_goes_on_within_its_budget(standing, tmp_path):
    saves = "n = len(list((folder / 'checkpoints').glob('step-*')))\n"
    saves += "if n < 4: (folder / 'checkpoints' / f'step-0000000{n + 1}').mkdir(parents=True); sys.exit(1)"
    members = standing(
        f"{ONCE}first and os.kill(os.getpid(), signal.SIGKILL)",
        "(folder / 'tried').open('a').write('.'); sys.exit(69)",
        "(folder / 'tried').open('a').write('.'); sys.exit(3)",
        saves,  # each time it comes further: no two deaths in a row without a new checkpoint
    )
    progress, text = said()
    with Signals() as signals:
        beside.run(members, 2, tmp_path / "logs", signals, progress, 2)
    told = text.getvalue()
    assert members[0].done
    assert "a0 on ink, seed 0: died: it was killed by SIGKILL: restart 1 of 2, from its newest checkpoint" in told
    assert members[1].problem == "died: it ended with exit code 69"
    assert [len((member.folder / "tried").read_text()) for member in members[1:3]] == [3, 1]
    assert members[3].done
    assert [member.code for member in members] == [None, 69, 3, None]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_handed_to_all_and_waits_for_what_they_save(standing, tmp_path, number):
    members = standing(*["time.sleep(30)"] * 3)

    def stop() -> None:
        while not all((member.folder / "begun").exists() for member in members[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    progress, text = said()
    with pytest.raises(StopRequested) as stopped, Signals() as signals:
        beside.run(members, 2, tmp_path / "logs", signals, progress)
    assert text.getvalue().count(": stopped\n") == 2
    assert "died" not in text.getvalue()
    assert stopped.value.number == number
    assert [(member.folder / "saved").exists() for member in members] == [True, True, False]
    assert not (members[2].folder / "begun").exists()


def test_a_run_ends_with_the_process_that_began_it():
    code = (
        "import threading, time; from rlfusion.cli import member; threading.Thread(target=member._with_parent).start()"
    )
    child = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"], stdin=subprocess.PIPE)
    time.sleep(0.3)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=30) == -signal.SIGTERM


def test_room(monkeypatch):
    assert beside.room(Compare(side_by_side=3)) == 3
    monkeypatch.setattr(beside, "_processors", lambda: 9)
    monkeypatch.setattr(beside, "_memory", lambda: 1e15)
    assert beside.room(Compare(side_by_side="auto", device="cpu", threads=2)) == 4
    assert beside.room(Compare(side_by_side="auto", device="cpu", threads=20)) == 1
    monkeypatch.setattr(beside, "_memory", lambda: 1.0)
    assert beside.room(Compare(side_by_side="auto", device="cpu")) == 1
    with pytest.raises(ConfigError, match="side_by_side = 0"):
        Compare(side_by_side=0)
    assert digest(flat(Compare())) == digest(flat(Compare(side_by_side="auto"))), "it decides no bits"


def test_the_table_fits_80_columns(tmp_path):
    progress, text = said(80)
    progress.console = Console(file=text, width=80, force_terminal=True, color_system=None)
    members = [Member("x" * n, "ink", 0, Finetune(), tmp_path / str(n)) for n in (5, 90)]
    members[1].folder.mkdir()
    lines = [
        {"step": 0, "evaluation/gain": 0.0},
        {"step": 2, "evaluation/gain": 1.5},
        {"step": 2, "monitor/alarms": 1.0},
    ]
    (members[1].folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"half')
    lap = {"step": 2, "queries": 4800, "seconds": 1.0, "cpu_seconds": 1.0}
    (members[1].folder / "timing.jsonl").write_text(json.dumps(lap) + "\n")
    assert Sight.of(members[1].folder) == Sight(2, 4800, 1.5, True)
    with progress.rows(*HEAD) as table:
        watching = Watching(3, progress, table)
        watching.show(members)
        drawn = table.table(watching._head(2), [row(member, Sight.of(member.folder)) for member in members])
    assert "+1.50 !" in text.getvalue(), "it was drawn"
    plain = Console(file=(page := io.StringIO()), width=80)
    plain.print(drawn)
    rows = page.getvalue().splitlines()
    assert max(map(len, rows)) <= 80
    assert "0 of 3 runs done, 2 at work, 1 wait" in rows[0]
    assert rows[-1].split()[-4:] == ["2/24", "4,800", "+1.50", "!"]


@pytest.mark.alone
def test_the_same_bits_as_one_after_another(tiny_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    monkeypatch.chdir(tmp_path)
    words = ["--agents", "ddpo(micro_batch=64),draft(micro_batch=24),grpo(window=99)", "--rewards", "ink", *SMALL, *FEW]
    for name, at_once in (("one", "1"), ("two", "2")):
        assert main(["compare", *map(str, words), "--name", name, "--side_by_side", at_once]) == 0
    told = capsys.readouterr().err
    assert "3 runs, 2 side by side" in told
    files = [sorted((tmp_path / "runs" / name).glob("*/metrics.jsonl")) for name in ("one", "two")]
    assert [file.parent.name for file in files[0]] == [file.parent.name for file in files[1]]
    assert len(files[0]) == 2
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    tables = [json.loads((tmp_path / "runs" / name / "comparison.json").read_text()) for name in ("one", "two")]
    assert [(o["agent"], o["problem"]) for o in tables[0]] == [(o["agent"], o["problem"]) for o in tables[1]]
