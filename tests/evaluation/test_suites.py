"""Suites of prompts in their authors' formats, and their figures by category, of one model and of two."""

import json
from pathlib import Path

import pytest
import torch

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.jobs import suites

PARTI = "Prompt\tCategory\tChallenge\tNote\n" + "".join(
    f"{line}\n"
    for line in (
        'a "red" cat\tAnimals\tBasic\t',
        "a dog, running\tAnimals\tImagination\ta note",
        "a table\tArtifacts\tBasic\t",
        "bond\tAbstract\tBasic\t",
    )
)
DRAWBENCH = 'Prompts,Category\nA red car,Colors\n"One, two cats",Counting\nA blue car,Colors\n'
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [], "prompt": "a photo of two clocks"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
]
DPG = {"partiprompts10": "ten", "partiprompts2": "two\nlines", "COCOval2014000000000285": "a kitchen", "whoops0": "odd"}


@pytest.fixture
def given(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    (tmp_path / "DrawBench.csv").write_text(DRAWBENCH)
    (tmp_path / "geneval" / "prompts").mkdir(parents=True)
    lines = "".join(f"{json.dumps(row)}\n" for row in GENEVAL)
    (tmp_path / "geneval" / "prompts" / "evaluation_metadata.jsonl").write_text(lines)
    (tmp_path / "dpg").mkdir()
    for name, text in DPG.items():
        (tmp_path / "dpg" / f"{name}.txt").write_text(text)
    return tmp_path


def test_the_published_formats_are_read(given):
    parti = suites.read("parti=PartiPrompts.tsv", given)
    assert parti.count == 4
    assert parti.groups() == {
        "Category": {"Animals": [0, 1], "Artifacts": [2], "Abstract": [3]},
        "Challenge": {"Basic": [0, 2, 3], "Imagination": [1]},
    }
    assert suites.read("parti=.", given) == suites.Suite(**{**vars(parti), "prompts": "PartiPrompts.tsv"})
    assert suites.read("drawbench=DrawBench.csv", given).groups() == {"Category": {"Colors": [0, 2], "Counting": [1]}}
    geneval = suites.read("geneval=geneval", given)
    assert geneval.groups() == {"tag": {"single_object": [0, 2], "counting": [1]}}
    assert geneval.metadata[1]["include"] == [{"class": "clock", "count": 2}]


def test_a_folder_of_texts_is_a_suite_by_source(given):
    held = suites.read("dpg=dpg", given / "runs")
    rows = [json.loads(line) for line in Path(held.prompts).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a kitchen", "two lines", "ten", "odd"]
    assert held.groups() == {"source": {"COCOval": [0], "partiprompts": [1, 2], "whoops": [3]}}
    assert suites.read("dpg=dpg", given / "runs") == held
    (given / "dpg" / "whoops0.txt").write_text("else")
    assert suites.read("dpg=dpg", given / "runs").sha256 != held.sha256


def test_a_name_alone_is_looked_for_below_the_root(given):
    (given / "runs" / "suites" / "parti").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"expected PartiPrompts.tsv in it, or put it into .*google-research/parti"):
        suites.read("parti", given / "runs")
    (given / "PartiPrompts.tsv").rename(given / "runs" / "suites" / "parti" / "PartiPrompts.tsv")
    assert suites.read("parti", given / "runs").count == 4


def test_any_file_of_prompts_is_a_suite(given):
    (given / "own.jsonl").write_text('{"prompt": "a", "Type": 1}\n{"prompt": "b", "Type": null}\n')
    assert suites.read("own.jsonl", given).groups() == {"Type": {"1": [0], "(none)": [1]}}
    (given / "own.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "category": "x"}\n')
    assert suites.read("own.jsonl", given).groups() == {"category": {"(none)": [0], "x": [1]}}
    (given / "latin").mkdir()
    (given / "latin" / "0.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8, expected UTF-8"):
        suites.read("dpg=latin", given)
    (given / "own.txt").write_text("a\nb\n")
    assert suites.read("own.txt", given).groups() == {}
    (given / "own.jsonl").write_text('{"prompt": "a", "tag": ["x"]}\n')
    with pytest.raises(ConfigError, match=r"'tag' is \['x'\], expected a category"):
        suites.read("own.jsonl", given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("part", "did you mean 'parti'"),
        ("part=x.tsv", "did you mean 'parti'"),
        ("nowhere.tsv", "there is no such file"),
        ("a red cat v1.5 style", "unknown suite 'a red cat v1.5 style'"),
        ("parti=nowhere.tsv", "has no prompts: expected --suite parti=PATH"),
        ("geneval", "put it into"),
        ("parti=DrawBench.csv", "prompt 1 of 'DrawBench.csv' has Category: expected Category, Challenge, Note"),
        ("drawbench=geneval/prompts/evaluation_metadata.jsonl", "expected Category beside the prompt"),
        ("geneval=PartiPrompts.tsv", "expected tag, include beside the prompt"),
        ("dpg=geneval", "has no .txt"),
        ("dpg=DrawBench.csv", "has no .txt"),
    ],
)
def test_what_is_no_suite_is_refused(given, text, said):
    with pytest.raises(ConfigError, match=said):
        suites.read(text, given)


REWARD = """
import torch

def dark(samples, cond):
    return -samples.flatten(1).mean(1)

def objects(images, prompts, metadata):
    return [len(text) + 100 * held["include"][0]["count"] for text, held in zip(prompts, metadata)]
"""


def evaluated(*words) -> dict:
    assert main(["evaluate", *map(str, words), "--out", "it.json"]) == 0
    return json.loads(Path("it.json").read_text())


def test_figures_by_category_of_one_model_and_of_two(given, tiny_pipelines, capsys):
    (given / "mine.py").write_text(REWARD)
    common = ("--checkpoint", tiny_pipelines["sd"], "--suite", "geneval=geneval", "--per_prompt", 2, "--chain.steps", 2)
    common += ("--rewards", "mine.py:dark,mine.py:objects")
    one = evaluated(*common)
    assert "geneval, by tag" in capsys.readouterr().out
    assert (one["suite"]["prompts"], one["count"]) == (3, 6)
    held, (name,) = one["suite"]["categories"]["tag"], one["suite"]["categories"]["tag"]["counting"]["models"]
    expected = [len(row["prompt"]) + 100 * row["include"][0]["count"] for row in GENEVAL]
    rewards = {category: told["models"][name]["training"] for category, told in held.items()}
    assert rewards["counting"]["reward_objects"] == expected[1]
    assert rewards["single_object"]["reward_objects"] == (expected[0] + expected[2]) / 2
    mean = (2 * rewards["single_object"]["reward_dark"] + rewards["counting"]["reward_dark"]) / 3
    assert mean == pytest.approx(one["reward_dark"], abs=1e-6)
    evaluated(*common, "--against", tiny_pipelines["sd"])
    assert "6 samples on the same seeds" in capsys.readouterr().out


def test_two_models_are_paired_within_a_category(given):
    """Sample i is of prompt i modulo their number; of a category the samples of its prompts alone are compared."""
    from rlfusion.jobs.evaluate import Figures, _by_category

    suite = suites.read("drawbench=DrawBench.csv", given)
    first, second = torch.arange(6.0), torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0, 4.0])
    found = {(m, "training"): Figures({}, {"reward": v}) for m, v in (("a", first), ("b", second))}
    held = _by_category(suite, found, 0)["categories"]["Category"]
    assert held["Counting"]["models"] == {"a": {"training": {"reward": 2.5}}, "b": {"training": {"reward": 2.5}}}
    assert held["Colors"]["paired"]["training"]["reward"]["difference"] == pytest.approx((0 + 1 + 0 + 1) / 4)
    assert held["Colors"]["paired"]["training"]["reward"]["better"] == 0.75
    assert held["Counting"]["paired"]["training"]["reward"]["difference"] == 0


def test_settings_that_do_not_go_with_a_suite_are_refused(given, tiny_root, capsys):
    model = ("--checkpoint", str(tiny_root / "first"), "--root", str(tiny_root))
    for words, said in {
        ("--suite", "parti=PartiPrompts.tsv"): "expected rewards",
        ("--suite", "parti=PartiPrompts.tsv", "--reward", "ink", "--prompts", "a"): "suite and prompts are given",
        ("--per_prompt", "2", "--reward", "ink"): "per_prompt = 2: it is of a suite",
        ("--suite", "parti=PartiPrompts.tsv", "--reward", "ink", "--evaluation.samples", "9"): "expected per_prompt",
        ("--suite", "parti=PartiPrompts.tsv", "--reward", "ink"): "knows classes and reads no texts",
    }.items():
        assert main(["evaluate", *model, *words]) == 2
        assert said in capsys.readouterr().err
