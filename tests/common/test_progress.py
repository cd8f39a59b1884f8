"""Progress: a bar that fits a terminal, and elsewhere plain lines at times, with the time that is left."""

import io
import re

import pytest
from rich.console import Console
from tiny_runs import TINY

from rlfusion.cli.main import main
from rlfusion.common import progress as shown
from rlfusion.common.manner import Manner, speaking
from rlfusion.common.progress import Progress, Told

FIGURES = {"reward": -1.23456, "gain": -1.5, "diversity": 0.8312, "kl": 123.4}


def told(total: int, start: int, seconds: float) -> list[tuple[int, str]]:
    """The lines of a bar whose steps take so long, each with the steps done."""
    found, now, step = [], [100.0], [0]
    bar = Told(lambda line: found.append((step[0], line)), "fine-tuning", total, start, lambda: now[0])
    for done in range(start + 1, total + 1):
        step[0] = done
        now[0] += seconds
        bar.advance(**FIGURES)
    return found


def test_a_line_each_tenth_of_the_way_with_the_time_that_is_left():
    lines = told(200, 0, 1.0)
    assert [step for step, _ in lines] == list(range(20, 201, 20))
    figures = "reward -1.23  gain -1.5  diversity 0.831  kl 123"
    assert lines[2][1] == f"fine-tuning 60/200 (30 %), 0:01:00 so far, 0:02:20 to go: {figures}"
    assert lines[-1][1].startswith("fine-tuning 200/200 (100 %), 0:03:20 so far, 0:00:00 to go")


def test_a_slow_one_says_a_line_each_thirty_seconds_and_a_quick_one_none():
    assert [step for step, _ in told(1000, 0, 7.0)][:6] == [5, 10, 15, 20, 25, 30]
    assert [step for step, _ in told(5, 0, 45.0)] == [1, 2, 3, 4, 5]
    assert told(100, 0, 0.01) == []
    assert [step for step, _ in told(100, 0, 0.125)] == list(range(16, 97, 16)), "two seconds lie between two lines"


def test_one_that_goes_on_counts_its_own_steps_alone():
    step, line = told(100, 50, 3.0)[0]
    assert (step, line[:61]) == (60, "fine-tuning 60/100 (60 %), 0:00:30 so far, 0:02:00 to go: rew")


@pytest.mark.parametrize("width", [72, 80, 120])
def test_a_bar_in_a_terminal_fits_it_and_shows_what_is_left(width, monkeypatch):
    progress, text = Progress(), io.StringIO()
    progress.console = Console(file=text, width=width, force_terminal=True, color_system=None)
    with progress.bar("fine-tuning", 1600) as bar:
        bar.advance(**FIGURES)
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue()))
    assert max(map(len, lines)) <= width
    last = [line for line in lines if "1/1600" in line][-1]
    assert re.search(r"1/1600 (-:--:--|\d:\d\d:\d\d) reward -1.23", last)
    assert ("kl 123" in last) == (width >= 80)


def test_a_quiet_command_says_nothing(capsys):
    with speaking(Manner(quiet=True)), Progress().bar("fine-tuning", 3) as bar:
        bar._clock = lambda: 1e9
        bar.advance()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", ["", "--json", "--quiet"])
def test_a_log_of_a_run_has_the_figures_that_matter(flag, tiny_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shown, "FEWEST_S", 0.0)
    assert main(["finetune", *map(str, TINY), "--reward", "ink", "--monitor.every", "2", *filter(None, [flag])]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("fine-tuning")]
    assert "\r" not in said.err
    assert "fine-tuning" not in said.out
    if flag == "--quiet":
        assert said.err == ""
        return
    assert len(lines) == 6
    number = r"-?\d[\d.e+-]*"
    assert re.fullmatch(
        rf"fine-tuning 6/6 \(100 %\), 0:00:\d\d so far, 0:00:00 to go: "
        rf"reward {number}  gain {number}  diversity {number}  kl {number}",
        lines[-1],
    )
