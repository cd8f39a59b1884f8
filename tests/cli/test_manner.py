"""--quiet and --json of the commands that run, the last line of each, and tables that fit their terminal."""

import io
import json
import shlex
import sys

import pytest
from rich.console import Console
from tiny_runs import TINY

from rlfusion.cli import tables
from rlfusion.cli.main import AT_ONCE, COMMANDS, main
from rlfusion.cli.words import RESUMABLE, mannered
from rlfusion.common.errors import ConfigError
from rlfusion.common.manner import Manner, manner, speaking
from rlfusion.common.progress import Progress


def test_they_are_flags_wherever_they_stand():
    words = ["--quiet", "--seed", "3", "--json"]
    assert mannered(words) == (["--seed", "3"], Manner(True, True))
    assert mannered(words[1:3]) == (["--seed", "3"], Manner())
    with pytest.raises(ConfigError, match="--quiet = true: expected --quiet alone"):
        mannered(["--quiet=true"])


def test_a_manner_ends_with_its_command():
    with speaking(Manner(quiet=True)):
        assert Progress().console.quiet
    assert not Progress().console.quiet
    assert manner() == Manner()


@pytest.mark.parametrize("command", RESUMABLE)
def test_errors_are_said_in_every_manner(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags in (["--quiet"], ["--json"], ["--quiet", "--json"]):
        assert main([command, *flags, "--nowhere", "1"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert "unknown setting 'nowhere'" in line


def test_what_a_run_says(tiny_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    monkeypatch.chdir(tmp_path)
    words = [*map(str, TINY), "--reward", "ink", "--monitor.every", "0", "--name", "my run"]
    assert main(["finetune", *words, "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out == "see it: rlfusion board 'runs/my run'\n"
    assert shlex.split(said.out)[-1] == "runs/my run"
    assert main(["finetune", "--resume", "runs/my run", "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert said.out.count("\n") == 1
    assert (told["command"], told["folder"], told["queries"], told["updates"]) == ("finetune", "runs/my run", 144, 6)
    assert told["after"]["reward"] == json.loads((tmp_path / "runs/my run/summary.json").read_text())["after"]["reward"]
    assert "is finished" in said.err
    assert main(["finetune", "--resume", "runs/my run", "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    assert (said.err, json.loads(said.out)["updates"]) == ("", 6)
    assert main(["finetune", "--resume", "runs/my run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "see it: rlfusion board 'runs/my run'"
    assert max(len(line) for line in out if not line.startswith(("in ", "see it"))) <= 80


POINT = {"gain": 1.5, "queries": 2400, "cpu_seconds": 12.34, "alarm": False}


def told(width: int, terminal: bool, folder) -> list[str]:
    console = Console(file=(text := io.StringIO()), width=width, force_terminal=terminal, color_system=None)
    tables._compared(console, "| a wide page " * 20, folder)
    return text.getvalue().splitlines()


def test_a_narrow_terminal_has_the_figures_that_fit(tmp_path):
    long = "DDPO with a long name [of many words] " * 3 + "lr=0.0001"
    runs = [{"agent": long, "reward": "ink", "seed": n, "problem": "", "points": [POINT]} for n in (0, 1)]
    runs[1]["points"] = [POINT, {**POINT, "gain": 2.5, "alarm": True}]
    runs.append({"agent": "draft", "reward": "ink", "seed": 0, "problem": "refused", "points": []})
    (tmp_path / "comparison.json").write_text(json.dumps(runs))
    lines = told(80, True, tmp_path)
    assert max(len(line) for line in lines if not line.startswith("all figures")) <= 80
    page = "\n".join(lines)
    for figure in ("+2.00", "2,400", "12.3", "[of many", "draft"):
        assert figure in page
    assert lines[-1] == f"all figures: {tmp_path / 'comparison.md'}"
    wide = "| a wide page " * 20
    assert told(80, False, tmp_path) == told(400, True, tmp_path) == [wide]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_is_told_at_once_that_a_command_is_there(command, monkeypatch, capsys):
    """Torch takes seconds to import; a log or a pipe has only what the command says."""
    monkeypatch.setitem(COMMANDS, command, lambda arguments: print("done", file=sys.stderr))
    told = [] if command in AT_ONCE else [f"rlfusion {command}: loading"]
    for terminal, words, before in ((True, [], told), (True, ["--quiet"], []), (False, [], [])):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert main([command, *words]) == 0
        assert capsys.readouterr().err.splitlines() == [*before, "done"]
