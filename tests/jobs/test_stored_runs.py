"""The runs of a folder: what each is, the best, and their removal; made by hand, so that all states are there."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlfusion.cli.main import main
from rlfusion.cli.stored_runs import _bytes
from rlfusion.common.errors import ConfigError
from rlfusion.config import Finetune
from rlfusion.jobs import stored_runs
from rlfusion.training import identity


def run(name: str, gain: float | None = None, finished: bool = False, **settings) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    made = identity.enter(folder, "finetune", replace(Finetune(reward="ink"), **settings))
    (folder / "checkpoints" / "step-00000008").mkdir(parents=True)
    if gain is not None:
        lines = [{"step": 0, "evaluation/gain": 9.0}, {"step": 24, "evaluation/gain": gain, "evaluation/frechet": 1.5}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        made.seal("summary.json", {"queries": 1})
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run("a", 1.25, finished=True)
    run("b", 2.5)
    run("c", None, reward="symmetry")
    run("d", 0.5, finished=True, reward="symmetry", seed=7)
    (Path("runs") / "cache").mkdir()
    (Path("runs") / "notes.txt").write_text("mine")
    return tmp_path


def held(capsys) -> dict[str, dict]:
    assert main(["runs", "--json"]) == 0
    return {Path(one["folder"]).name: one for one in json.loads(capsys.readouterr().out)}


def test_the_list_says_of_each_what_it_is(place, capsys):
    found = held(capsys)
    assert found.keys() == {"a", "b", "c", "d"}
    assert {name: one["state"] for name, one in found.items()} == {
        **{"a": "finished", "b": "stopped", "c": "stopped", "d": "finished"}
    }
    assert (found["a"]["updates"], found["b"]["updates"]) == (None, 8)
    assert (found["b"]["gain"], found["c"]["gain"]) == (2.5, None)
    assert (found["d"]["reward"], found["d"]["seed"], found["d"]["agent"]) == ("symmetry", 7, "ddpo")
    assert found["a"]["bytes"] == sum(file.stat().st_size for file in Path("runs/a").rglob("*") if file.is_file())
    assert main(["runs"]) == 0
    said = capsys.readouterr().out
    assert "8 of 24" in said
    assert "2.50" in said
    assert main(["runs", "runs/a"]) == 0
    assert "runs/b" not in capsys.readouterr().out


def test_a_table_fits_80_columns(place, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_status_of_one(place, capsys):
    assert main(["runs", "status", "runs/b"]) == 0
    said = capsys.readouterr().out
    assert "rlfusion finetune --resume runs/b" in said
    assert "evaluation/frechet" in said
    assert main(["runs", "status", "runs/a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["evaluation/gain"] == 1.25


def test_the_best_of_each_reward(place, capsys):
    assert main(["runs", "best"]) == 0
    said = capsys.readouterr().out
    assert "runs/b" in said
    assert "runs/d" in said
    assert "runs/a" not in said
    runs = stored_runs.found(["runs"])
    assert [(one.folder.name, value) for one, value in stored_runs.best(runs, "evaluation/frechet")] == [
        *(("a", 1.5), ("d", 1.5))
    ]
    assert main(["runs", "best", "--by", "evaluation/gan"]) == 2
    assert "did you mean 'evaluation/gain'?" in capsys.readouterr().err


def test_the_largest_first(place, capsys):
    (Path("runs/c") / "model.bin").write_bytes(bytes(5_000_000))
    assert main(["runs", "size"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "runs/" in line]
    assert "runs/c" in lines[0]
    assert "5.01 MB" in lines[0]
    assert [_bytes(n) for n in (0, 999, 1000, 1_234_567, 5 * 10**15)] == ["0 B", "999 B", "1 kB", "1.23 MB", "5e+03 TB"]


def test_removal_takes_a_yes(place, monkeypatch, capsys):
    assert main(["runs", "remove", "runs/a"]) == 2
    assert "expected yes, or --yes" in capsys.readouterr().err
    assert Path("runs/a").exists()
    for answer, gone in (("no", False), ("yes", True)):
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert main(["runs", "remove", "runs/a"]) == (0 if gone else 2)
        assert Path("runs/a").exists() != gone
    assert main(["runs", "remove", "runs/b", "runs/c", "--yes"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["cache", "d", "notes.txt"]


def test_what_others_stand_on_is_said(place, capsys):
    run("e", 1.0, base=str(Path("runs/a/model").resolve()))
    assert main(["runs", "remove", "runs/a"]) == 2
    assert "runs/e begins with its model" in capsys.readouterr().out
    assert main(["runs", "remove", "runs/a", "runs/e", "--yes"]) == 0
    assert "begins" not in capsys.readouterr().out


def test_a_run_at_work_is_told_and_stays(place, capsys):
    with (Path("runs/b") / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert held(capsys)["b"]["state"] == "at work"
        assert main(["runs", "remove", "runs/b", "--yes"]) == 2
        assert "is at work" in capsys.readouterr().err
    assert held(capsys)["b"]["state"] == "stopped"


def test_nothing_but_a_run_is_removed(place, capsys):
    Path("link").symlink_to("runs/a")
    for text, said in (
        ("runs", "is no run"),
        ("runs/cache", "is no run"),
        ("runs/aa", "is no run"),
        ("link", "is a link"),
    ):
        assert main(["runs", "remove", text, "--yes"]) == 2
        assert said in capsys.readouterr().err
    assert Path("runs/a/run.json").exists()
    with pytest.raises(ConfigError, match="is no run"):
        stored_runs.remove(replace(stored_runs.one("runs/a"), folder=Path("runs/cache")))


def test_a_damaged_run_is_listed_as_such(place, capsys):
    (Path("runs/b") / "run.json").write_text("{")
    assert held(capsys)["b"]["state"] == "damaged"
    assert main(["runs", "remove", "runs/b", "--yes"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lst"], "did you mean 'list'?"),
        (["list", "--jsn"], "did you mean '--json'?"),
        (["remove", "--yes"], "expected the folder of a run"),
        (["status"], "expected the folder of a run"),
        (["status", "runs/a-long-nam"], "did you mean 'runs/a-long-name'?"),
        (["best", "--by"], "--by has no value"),
        (["list", "--json=1"], "stands alone"),
        (["list", "nowhere/at/all"], "is no folder"),
    ],
)
def test_what_is_refused(place, capsys, words, said):
    run("a-long-name")
    assert main(["runs", *words]) == 2
    assert said in capsys.readouterr().err
