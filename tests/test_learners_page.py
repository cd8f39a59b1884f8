"""The page of all learners is what its script draws of the record; who is ahead, against cases by hand."""

import json
import sys

import pytest
from house import ROOT

from rlfusion.agents import NAMES
from rlfusion.jobs.curves import Point

RECORD = ROOT / "benchmarks" / "results" / "learners.json"
MODULES = ("learners", "learners_page", "learners_plots", "learners_record")


@pytest.fixture(scope="module")
def learners():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import learners

    yield learners
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def races(learners):
    return [learners.Race.read(one) for one in json.loads(RECORD.read_text()).values()]


def test_the_page_is_what_is_drawn_of_the_record(learners, races):
    assert (ROOT / "docs" / "learners.md").read_text() == learners.learners_page.page(races, learners.CONFIGS)


def test_the_pages_of_algorithms_have_the_tables_of_the_record(learners, races):
    index = (ROOT / "docs" / "algorithms" / "index.md").read_text()
    assert learners.learners_page.with_winners(index, races) == index
    for name in NAMES:
        page = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text()
        assert f"<!-- runs of {name} -->" in page
        assert learners.learners_page.with_runs(page, races) == page
    with pytest.raises(SystemExit, match="no <!-- winners -->"):
        learners.learners_page.with_winners("nothing", races)


def test_every_learner_has_three_seeds_somewhere_and_a_curve_on_its_page(races):
    rows = {agent.partition("(")[0] for race in races for agent in race.agents.values()}
    assert rows == set(NAMES)
    assert {len(seeds) for race in races for seeds in race.curves.values()} == {3}
    for name in NAMES:
        assert f"]({name}.svg)" in (ROOT / "docs" / "algorithms" / f"{name}.md").read_text()
        assert (ROOT / "docs" / "algorithms" / f"{name}.svg").is_file()


def test_the_record_is_of_the_settings_that_there_are(learners, races):
    from rlfusion.cli.arguments import settings_of
    from rlfusion.config.compare import shown, written

    assert [race.reward for race in races] == list(learners.REWARDS)
    for race in races:
        config = settings_of("compare", ["--config", str(learners.CONFIGS / f"{race.reward}.yaml")])
        assert race.agents == {shown(text): written(text) for text in config.agents}
        assert race.config["budget"] == config.budget_queries
        assert race.config["samples"] == config.evaluation.samples


def point(queries: int, gain: float, frechet: float) -> Point:
    return Point(queries // 100, queries, 0.0, queries / 100, gain, gain, 0.9, frechet, 0.8, {})


def race_of(learners, runs: dict[str, list[list[Point]]], **changes):
    parts = {
        "reward": "ink",
        "made": {"torch": "2", "python": "3"},
        "config": {"budget": 400, "seeds": 3, "samples": 10, "target": 2.0, "quality": 3.0},
        "baselines": {"base": {"reward": 0.0, "reward_std": 1.0, "agreement": 0.9, "frechet": 5.0}},
        "agents": {name: "nft" for name in runs},
        "curves": runs,
        "prompts": {
            name: [{"0": points[-1].gain, "1": points[-1].gain + 0.1} for points in runs[name]] for name in runs
        },
    }
    return learners.Race(**parts | changes)


def run_to(queries: int, frechet: float = 10.0) -> list[Point]:
    """Reaches +2 sd after so many queries, within the limit of 15 only where ``frechet`` is."""
    return [point(0, 0.0, 5.0), point(queries, 2.5, frechet)]


def test_who_is_ahead(learners):
    queries, _, nearest, farthest = learners.learners_page.QUESTIONS
    answer = learners.learners_page.answer
    race = race_of(
        learners,
        {
            "slow": [run_to(300, 20.0), run_to(300, 20.0), run_to(300, 20.0)],
            "fast": [run_to(100), run_to(200), run_to(200)],
            "mixed": [run_to(200), run_to(100), run_to(300)],
            "twice": [run_to(100), run_to(100), [point(0, 0.0, 5.0), point(400, 1.0, 9.0)]],
        },
    )
    first = answer(race, queries, list(race.curves))
    assert (first.best, first.mean) == ("fast", pytest.approx(500 / 3))
    assert [name for name, _ in first.equal] == ["mixed"]  # "twice" has not come there on every seed
    assert answer(race, nearest, ["slow", "fast"]) == ("fast", pytest.approx(2.0), [])
    assert answer(race, farthest, ["slow"]) is None
    assert answer(race, farthest, ["slow", "twice"]) == ("twice", pytest.approx(2.0), [])


def test_cells(learners):
    race = race_of(learners, {"a": [run_to(100), run_to(300), [point(0, 0.0, 5.0)]], "b": [run_to(100)] * 3})
    table = learners.learners_page.table(race)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["a"][0] == "200 [100, 300], 2 of 3 seeds"
    assert rows["b"][:4] == ["100", "1.0", "10", "2.50"]
    assert [row[0] for row in table.rows] == ["base (no training)", "b", "a"]
    assert rows["b"][-1].startswith("+0.83, p ")


def test_what_a_learner_learns_from(learners):
    from learners_record import source

    assert source("qsm(alpha=2.0)") == "samples"
    assert source("qsm(q='denoised')") == source("refl") == "gradient"
    assert source("sft(data='digits')") == source("opd(teacher_guidance=3.0)") == "no reward"


def test_figures_are_the_same_when_drawn_again(learners, tmp_path):
    race = race_of(learners, {"NFT": [run_to(100), run_to(300), run_to(200)]})
    for name in ("one.svg", "two.svg"):
        learners.learners_plots.side_by_side(race, ["NFT"], tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    assert ">NFT<" in drawn
    learners.learners_plots.of_each([race], tmp_path)
    assert ">NFT<" in (tmp_path / "nft.svg").read_text()
