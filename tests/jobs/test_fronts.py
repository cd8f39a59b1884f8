"""Several rewards against each other: what is on the front, in the table and in the page."""

import itertools
import json
import random
from dataclasses import replace

import pytest
from made_runs import STEPS, run

from rlfusion.cli.main import main
from rlfusion.jobs.compare.fronts import dominated, fronts, table
from rlfusion.jobs.curves import Point, curve


def point(updates: int, alarm: bool = False, **rewards: float) -> Point:
    return Point(updates, 10 * updates, 1.0, 1.0, 0.0, 1.0, None, None, 1.0, {}, alarm, rewards)


def test_the_front_is_what_nothing_dominates_by_brute_force():
    draw = random.Random(0)
    for rewards in ("ab", "abc"):
        points = [point(n, **{r: draw.randrange(6) for r in rewards}) for n in range(40)]
        (front,) = fronts([("x", 0, points)])
        best = {
            p.updates
            for p in points
            if not any(all(q.rewards[r] >= p.rewards[r] for r in rewards) and q.rewards != p.rewards for q in points)
        }
        assert {one.point.updates for one in front.members} == best
        firsts = [one.point.rewards["a"] for one in front.members]
        assert firsts == sorted(firsts, reverse=True)
    assert not dominated((1, 1), (1, 1))


def test_less_of_a_penalty_is_better():
    points = [replace(point(n, c=5, ink=ink), lower=("ink",)) for n, ink in enumerate((0.1, 0.9))]
    (front,) = fronts([("x", 0, points)])
    assert [one.point.updates for one in front.members] == [0]
    assert table(front).head[1:3] == ["c", "ink (less is better)"]
    assert len(fronts([("x", 0, points), ("y", 0, [point(0, c=1, ink=2)])])) == 2


def test_runs_of_the_same_rewards_share_a_front_and_alarms_do_not_count():
    one = [point(0, a=0, b=9), point(1, a=5, b=5), point(2, alarm=True, a=99, b=99)]
    two = [point(0, a=0, b=9), point(1, a=4, b=5), point(2, a=6, b=1)]
    other = [point(0, a=1), point(1, a=2)]
    (front,) = fronts([("x", 0, one), ("y", 0, two), ("z", 0, other), ("none", 0, [])])
    assert [(m.title, m.point.updates) for m in front.members] == [
        ("y, seed 0", 2),
        ("x, seed 0", 1),
        ("base, seed 0", 0),
    ]
    assert table(front).rows == [
        ["y, seed 0", "6", "1", "20"],
        ["x, seed 0", "5", "5", "10"],
        ["base, seed 0", "0", "9", "0"],
    ]


@pytest.fixture
def several(tmp_path):
    """Two runs of other weights of two rewards: one raises the first, the other one the second."""
    for number, name in enumerate(("one", "two")):
        weights = json.dumps({"ink": 1.0 + number, "symmetry": 2.0 - number})
        folder = run(tmp_path, name, "--reward", weights)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line, step in zip(lines, itertools.count()):
            line |= {"evaluation/reward_ink": 0.1 * step * (2 - number), "evaluation/reward_symmetry": number * step}
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path


def test_a_run_s_curve_has_its_rewards_and_nothing_else_of_that_name(several):
    points = curve(several / "one")
    assert points[STEPS].rewards == {"ink": pytest.approx(0.8), "symmetry": 0}


def test_the_report_has_the_front_of_runs_of_any_weights(several, monkeypatch, capsys):
    monkeypatch.chdir(several)
    assert main(["compare", "one", "two", "--out", "both"]) == 0
    folder = several / "both"
    text = (folder / "comparison.md").read_text()
    assert "## ink against symmetry: what no other evaluation beats in all" in text
    assert "ink against symmetry" in (folder / "report.html").read_text()
    for form in ("png", "pdf", "svg"):
        assert (folder / f"front-ink-symmetry.{form}").stat().st_size > 1000
