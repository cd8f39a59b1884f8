"""The script that holds overheads against their record refuses what it would make no use of."""

import subprocess
import sys

import pytest
from house import ROOT


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    before, path = set(sys.modules), list(sys.path)
    import learner_overhead

    yield learner_overhead
    sys.path[:] = path
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def status(script, monkeypatch, *arguments) -> object:
    monkeypatch.setattr(sys, "argv", ["learner_overhead.py", *arguments])
    monkeypatch.setattr(script.torch, "set_num_threads", lambda count: None)  # of the whole process
    try:
        script.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--check --table", "--check makes no use of --table"),
        ("--check --optimizer sgd", "--check makes no use of --optimizer"),
        ("--check --json x", "--check makes no use of --json"),
        ("--check --profile", "--check makes no use of --profile"),
        ("--table --json learner-overhead-cpu --case digits", "--table makes no use of --case"),
        ("--table", "--table: expected --json NAME"),
        ("--profile --json x", "--profile makes no use of --json"),
        ("--check nowhere", "there is no such record"),
        ("--agents ddpo,nosuch", "--agents nosuch: expected some of ddpo"),
        ("--rounds 0", "--rounds 0: expected at least 1"),
    ],
)
def test_what_is_of_no_use_is_refused(arguments, message, script, monkeypatch, capsys):
    monkeypatch.setattr(script, "measure", lambda *given: pytest.fail("it measures"))
    monkeypatch.setattr(script, "check", lambda *given: pytest.fail("it checks"))
    assert status(script, monkeypatch, *arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_a_check_that_measures_nothing_fails(script, monkeypatch):
    assert "nothing was measured" in status(script, monkeypatch, "--check", "--agents=sft", "--what=rollout")


def test_the_table_of_the_record_is_printed(script, monkeypatch, capsys):
    assert status(script, monkeypatch, "--table", "--json", script.RECORDED) == 0
    assert capsys.readouterr().out.startswith("|  | ddpo |")


def test_the_peers_heap_can_be_told_before_it_was_looked_at():
    code = "import peers; print(peers.Heap().most())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("0.0", "")
