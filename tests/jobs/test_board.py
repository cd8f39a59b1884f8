"""What a run tells TensorBoard of itself, and TensorBoard opened on runs."""

import re
import signal
import time
import urllib.request
from dataclasses import replace

import pytest
from processes import PATIENCE, Process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config import Board
from rlfusion.jobs.board import ONE_COLOUR
from rlfusion.jobs.finetune import about
from rlfusion.training.tracking import Tracker


def test_only_what_is_unusual_is_told_and_runs_share_their_columns():
    usual = settings_of("finetune", ["--agent", "grpo"])
    assert about.other_than_usual(usual) == {}
    assert about.texts(usual)["run/settings"] == "all are the usual ones"
    other = settings_of("finetune", ["--agent", "grpo", "--agent.lr", "0.5", "--agent.window", "3", "--name", "it"])
    assert about.other_than_usual(other) == {"agent.lr": 0.5, "agent.window": 3}
    assert "| agent.window | 3 |" in about.texts(other)["run/settings"]
    row, first = about.columns(other), about.columns(usual)
    assert row.keys() - first.keys() == {"with agent.window"}
    assert (row["agent"], row["reward"], row["seed"], row["lr"]) == ("grpo", "class_logprob", 0, 0.5)
    assert sorted(first) == ["agent", "kl", "lr", "reward", "seed", "start (model)", "steps"]
    both = replace(usual, reward={"ink": 2.0, "symmetry": 1.0}, base="runs/mine")
    assert (about.columns(both)["reward"], about.columns(both)[about.START]) == ("2 ink + 1 symmetry", "mine")
    cached = replace(usual, base="/runs/cache/base-0123/model")
    assert about.columns(cached)[about.START] == "base-0123"


def test_every_chart_shows_a_scalar_that_a_run_has(tiny_root):
    tags = EventAccumulator(str(tiny_root / "first")).Reload().Tags()["scalars"]
    for group, charts in about.CHARTS.items():
        for chart, patterns in charts.items():
            assert chart == "failed rewards" or any(re.match(p, tag) for p in patterns for tag in tags), (group, chart)


def test_a_run_of_a_comparison_has_the_charts_of_its_overlays(tmp_path):
    assert about.charts(tmp_path / "it") == about.CHARTS
    (tmp_path / "run.json").touch()
    assert list(about.charts(tmp_path / "it")) == [*about.COMPARED, *about.CHARTS]


def test_tensorboard_reads_the_layout(tmp_path):
    Tracker(tmp_path).layout({"group": {"chart": ["a$", "b"]}})
    events = EventAccumulator(str(tmp_path)).Reload()
    (tag,) = events.Tags()["tensors"]
    (held,) = events.Tensors(tag)
    layout = Layout.FromString(held.tensor_proto.string_val[0])
    assert [(c.title, [(x.title, list(x.multiline.tag)) for x in c.chart]) for c in layout.category] == [
        ("group", [("chart", ["a$", "b"])])
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runs": []}, "expected one folder at least"),
        ({"runs": ["a", "a"]}, "expected each once"),
        ({"port": 65536}, "port = 65536: expected a number from 0 to 65535"),
        ({"port": -1}, "port = -1"),
    ],
)
def test_boards_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Board(**settings)


@pytest.mark.parametrize(("folder", "said"), [("none", "does not exist"), ("empty", "holds no run")])
def test_a_board_of_no_runs_is_refused(folder, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["board", folder]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("emoji-clip", "emoji-clip"),
        (".", "."),
        ("three/ddpo-ink-seed1", "three/ddpo-ink"),
        ("ddpo-ink-seed0", "ddpo-ink"),
        ("ddpo-ink-seed12/ranks", "ddpo-ink"),
        ("a-seedling", "a-seedling"),
    ],
)
def test_runs_have_one_colour_but_for_their_seeds_and_every_run_has_one(name, group):
    found = re.search(ONE_COLOUR, name)
    assert found is not None
    assert found.groups() == (group,)


def test_a_board_answers_on_loopback_until_ctrl_c(tmp_path):
    (tmp_path / "it").mkdir()
    Tracker(tmp_path / "it").scalars(1, "evaluation", {"gain": 0.5})
    board = Process(tmp_path, "board", "it")
    told = r"TensorBoard of it: (http://127.0.0.1:\d+/)\?tagFilter=gain[^ ]*&smoothing=0&runColorGroup=regex%3A[^ #]+#"
    answers = lambda: board.out.exists() and re.search(told, board.out.read_text())  # noqa: E731
    deadline = time.monotonic() + PATIENCE
    while not answers():
        assert board.process.is_alive(), board.err.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    page = answers()[1]
    assert urllib.request.urlopen(page, timeout=30).status == 200
    while (
        "evaluation/gain" not in urllib.request.urlopen(f"{page}data/plugin/scalars/tags", timeout=30).read().decode()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    board.signal(signal.SIGINT)
    said = board.wait()
    assert said.code == 0, said.err
    assert not said.err
