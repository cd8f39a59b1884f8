"""Runs that are there, side by side: what several seeds say, how runs are told apart, and the one page of it."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import run
from scipy import stats

from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config import Compare, CompareRuns, Pretrain
from rlfusion.jobs.compare import compare_runs
from rlfusion.jobs.compare.seeds import band, difference, interval
from rlfusion.jobs.curves import Point, curve, sound
from rlfusion.jobs.finetune.about import at_the_goal
from rlfusion.training import identity
from rlfusion.training.tracking import save_png


class Read(HTMLParser):
    """What a page asks for from elsewhere, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for key, value in attrs if key in ("src", "href") and not value.startswith("data:")]

    def handle_data(self, data):
        self.text += data


def test_an_interval_is_the_bootstrap_of_the_seeds():
    values = np.random.default_rng(3).normal(size=(12, 2))
    mean, low, high = interval(values)
    assert np.allclose(mean, values.mean(0))
    for column in range(2):
        drawn = stats.bootstrap((values[:, column],), np.mean, method="percentile", n_resamples=20_000)
        assert np.allclose((low[column], high[column]), tuple(drawn.confidence_interval), atol=0.06)
    one = interval(values[:1])
    assert all(np.array_equal(part, values[0]) for part in one)


def point(queries: int, gain: float, alarm: bool = False) -> Point:
    return Point(queries, queries, 1.0, 1.0, gain, 1.0, None, None, 1.0, {}, alarm)


def test_a_mean_curve_is_of_equal_queries_up_to_the_first_end():
    runs = [[point(0, 0.0), point(10, 1.0), point(20, 2.0)], [point(0, 0.0), point(15, 3.0)]]
    found = band(runs, lambda p: p.queries, lambda p: p.gain)
    assert found.at.tolist() == [0, 10, 15]
    assert np.allclose(found.mean, [0, (1 + 2) / 2, (1.5 + 3) / 2])
    assert (found.low <= found.mean).all()
    assert (found.mean <= found.high).all()


@pytest.mark.parametrize("seeds", [3, 6, 20])
def test_a_difference_is_tested_by_changes_of_sign(seeds):
    draw = np.random.default_rng(seeds)
    one, other = (dict(enumerate(draw.normal(loc, size=seeds))) for loc in (0.5, 0.0))
    found = difference(one, other | {99: 5.0})
    values = np.array([one[seed] - other[seed] for seed in range(seeds)])
    known = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=2**15, rng=0)
    assert (found.seeds, found.mean) == (seeds, pytest.approx(values.mean()))
    assert found.p == pytest.approx(known.pvalue, abs=0 if seeds < 14 else 0.01)
    assert found.low < found.mean < found.high
    assert difference(one, {0: 1.0}) is None


def test_the_page_of_earlier_runs(tmp_path, capsys):
    runs = [run(tmp_path, f"sf-{seed}", "--agent.form", "sf", "--seed", seed, gain=1 + seed / 10) for seed in (0, 1)]
    runs += [run(tmp_path, f"is-{seed}", "--seed", seed, gain=2 + seed / 10, alarm=3) for seed in (0, 1)]
    (runs[2] / "diagnosis.md").write_text("## After 3 updates: what the reward does not see\n\n- <b>gamed</b>\n")
    save_png(runs[2] / "samples" / "after.png", torch.rand(1, 8, 8))
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    said, out = capsys.readouterr().out, tmp_path / "out"
    page = (out / "comparison.md").read_text()
    assert page in said
    assert "4 earlier run(s) of 40 queries" in page
    assert "| ddpo(form=sf) | 20 / 20 | 6.0 / 6.0 |" in page
    assert "| ddpo(form=is) (seed 0 alarm by update 3) (seed 1 alarm by update 3) | 10 / 10 |" in page
    assert "| ddpo(form=sf) - ddpo(form=is) | -4.00 |" in page
    html = (out / "report.html").read_text()
    read = Read(html)
    assert not read.outside, "the page is one file"
    assert "script" not in read.tags
    assert "b" not in read.tags, "what a monitor says is text"
    assert "<b>gamed</b>" in read.text
    assert "agent.form" in read.text
    assert html.count("data:image/png;base64,") == 1
    assert html.count("data:image/svg+xml;base64,") == 1
    rows = list(csv.reader((out / "comparison.csv").read_text().splitlines()))
    assert [row[1] for row in rows if row and row[0] == "ink"] == [
        "base (no training)",
        "ddpo(form=sf)",
        "ddpo(form=is) (seed 0 alarm by update 3) (seed 1 alarm by update 3)",
    ]
    assert [(out / f"ink.{form}").read_bytes()[:4] for form in ("png", "pdf")] == [b"\x89PNG", b"%PDF"]
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".pdf"}
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".pdf"} == before


def test_a_run_is_cut_at_the_first_alarm(tmp_path):
    points = curve(run(tmp_path, "it", alarm=3))
    assert [p.updates for p in sound(points)] == [0, 1, 2]
    assert len(sound(curve(run(tmp_path, "other")))) == 5


def test_hparams_has_the_price_of_the_goal_as_the_table_of_a_comparison_has_it(tmp_path):
    one = {"goal": 2.0, "queries to the goal": 20, "seconds to the goal": 4.0, "CPU seconds to the goal": 6.0}
    one |= {"frechet at the goal": 10.0, "diversity at the goal": 1.0}
    assert at_the_goal(run(tmp_path, "single")) == one
    never = {name: None for name in one} | {"goal": 2.0}
    assert at_the_goal(run(tmp_path, "low", gain=0.4)) == never
    assert at_the_goal(run(tmp_path, "gamed", alarm=2)) == never
    (tmp_path / "it").mkdir()
    identity.enter(tmp_path / "it", "compare", Compare(target=3.5))
    member = run(tmp_path / "it", "member")
    assert [at_the_goal(member)[name] for name in ("goal", "queries to the goal")] == [3.5, 40]


def test_runs_are_told_apart_by_any_setting(tmp_path):
    runs = [run(tmp_path, f"lr-{lr}", "--agent.lr", lr, gain=100 * lr) for lr in (0.01, 0.02)]
    runs.append(run(tmp_path, "of-grpo", agent="grpo"))
    page, folder = compare_runs(CompareRuns([str(tmp_path / "lr-*")], ["agent.lr"]))
    assert folder == tmp_path / "compare-agent.lr"
    assert "| lr=0.01 |" in page
    assert "| lr=0.02 |" in page
    page, _ = compare_runs(CompareRuns(list(map(str, runs))))
    assert "| ddpo(lr=0.01) |" in page
    assert "| grpo |" in page


def test_patterns_pass_over_what_is_no_run_and_a_comparison_is_all_its_runs(tmp_path):
    run(tmp_path, "a", "--seed", 1)
    (tmp_path / "cache").mkdir()
    identity.enter(_made(tmp_path / "pretrained"), "pretrain", Pretrain())
    whole = _made(tmp_path / "whole")
    identity.enter(whole, "compare", settings_of("compare", []))
    run(whole, "ddpo-ink-seed0")
    run(whole, "ddpo-ink-seed2", "--seed", 2, frechet=9.0)
    page, _ = compare_runs(CompareRuns([str(tmp_path / "*")]))
    assert "3 earlier run(s)" in page
    assert "| base of ddpo-ink-seed2 (no training) |" in page


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_what_cannot_be_compared_is_refused(tmp_path):
    one = run(tmp_path, "one")
    twin = run(tmp_path, "twin", "--agent.epochs", 2)
    bare = run(tmp_path, "bare", agent="grpo")
    lines = [json.loads(line) for line in (bare / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if "frechet" not in k} | {"evaluation/diversity": 1.0} for line in lines]
    images = {f"evaluation/{name}": 0.5 for name in ("brightness", "edge_density", "entropy")}
    (bare / "metrics.jsonl").write_text("".join(f"{json.dumps(line | images)}\n" for line in kept))
    empty = run(tmp_path, "empty", "--seed", 7)
    (empty / "before.json").unlink()
    pretrained = _made(tmp_path / "pretrained")
    identity.enter(pretrained, "pretrain", Pretrain())
    for runs, by, said in (
        ([tmp_path / "none"], "agent", "does not exist: expected the folder of a run"),
        ([tmp_path / "no*where"], "agent", "does not exist"),
        ([tmp_path], "agent", "is no run: it has no run.json"),
        ([pretrained], "agent", "is a run of pretrain: expected one of finetune or compare"),
        ([one, twin], "reward", "with seed 0; they differ in agent.epochs: expected --by with one of these"),
        ([one, bare], "agent", "cannot stand in one table"),
        ([one], "agent.lrr", "unknown setting of the runs 'agent.lrr'.*did you mean 'agent.lr'"),
        ([empty], "agent", "none has an evaluation yet"),
    ):
        with pytest.raises(ConfigError, match=said):
            compare_runs(CompareRuns(list(map(str, runs)), [by]))
    for by in ("lr", "agent.lr"):
        assert "| lr=0.001 |" in compare_runs(CompareRuns([str(one)], [by]))[0]
    page, _ = compare_runs(CompareRuns([str(one), str(empty)], ["seed"]))
    assert "| seed=7 | no evaluation yet |" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ddpo", "grpo"], "run 'ddpo' does not exist.*as in rlfusion compare --agents ddpo,grpo"),
        (["runs/a", "--agents", "ddpo"], "agents"),
        (["runs/a", "runs/a"], "runs = .*expected each once"),
    ],
)
def test_words_before_options_are_runs(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
