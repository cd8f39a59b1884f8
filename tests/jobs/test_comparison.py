"""Comparisons: what they run, how a run's figures are read, baselines, and the command from end to end."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import rlfusion
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_runs import TINY

from rlfusion.agents import ddpo, grpo
from rlfusion.cli import main
from rlfusion.cli.arguments import settings_of
from rlfusion.common.errors import ConfigError
from rlfusion.config import Compare
from rlfusion.data import digits
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine
from rlfusion.evaluation.classifier import JUDGE, Classifier
from rlfusion.jobs import stored_runs
from rlfusion.jobs.compare.baselines import Tries, baselines
from rlfusion.jobs.compare.job import _overlay, check, terms
from rlfusion.jobs.compare.report import Outcome, _baseline, _columns, _head, _row
from rlfusion.jobs.compare.tables import Table
from rlfusion.jobs.curves import Point, best_within, curve, first_at
from rlfusion.jobs.finetune.about import COLUMNS, COMPARED
from rlfusion.jobs.measure import Judged, Scored, Unjudged
from rlfusion.models import pipelines
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rewards import RewardError
from rlfusion.training.timing import Stopwatch

RUNS = ("--budget_queries", 60, "--evaluations", 2, "--evaluation.samples", 60, "--guidance", "[1]", "--seeds", 2)
SMALL = (*TINY[: TINY.index("--updates")], *TINY[TINY.index("--rollout.prompts") : TINY.index("--agent.micro_batch")])


def test_every_agent_meets_every_reward_with_every_seed_under_one_budget():
    plan = Compare(agents=["ddpo(form='sf')", "grpo"], rewards=["ink", "symmetry"], seeds=2, budget_queries=1000)
    runs = list(plan.runs())
    assert [(a, r, s) for a, r, s, _ in runs][:3] == [
        ("ddpo(form='sf')", "ink", 0),
        ("ddpo(form='sf')", "ink", 1),
        ("grpo", "ink", 0),
    ]
    assert len(runs) == 8
    for agent, reward, seed, settings in runs:
        assert (settings.reward, settings.seed, settings.budget_queries) == (reward, seed, 1000)
        assert (settings.updates - 1) * 240 < 1000 <= settings.updates * 240, "the last one is cut"
        assert settings.agent == (ddpo.Config(form="sf") if agent != "grpo" else grpo.Config())
    assert len({settings.chain for *_, settings in runs}) == 1


def test_lists_of_agents_on_the_command_line():
    words = ["--agents", "ddpo(form='sf', lr=0.001),grpo(window=5)", "--rewards=ink,symmetry"]
    read = settings_of("compare", words)
    assert read.agents == ["ddpo(form='sf', lr=0.001)", "grpo(window=5)"]
    assert read.rewards == ["ink", "symmetry"]
    assert settings_of("compare", ["--agents", "[grpo]"]).agents == ["grpo"]


def test_agents_that_name_no_micro_batch_get_that_of_the_comparison():
    agents = ["ddpo", "small = grpo(micro_batch=4)", "refl"]
    sizes = [settings.agent.micro_batch for *_, settings in Compare(agents=agents, micro_batch=8).runs()]
    assert sizes == [8, 4, 8]
    assert [settings.agent.micro_batch for *_, settings in Compare(agents=agents).runs()] == [2048, 4, 64]
    with pytest.raises(ConfigError, match="micro_batch = 0"):
        Compare(micro_batch=0)


def test_an_agent_may_be_given_a_name():
    plan = Compare(agents=["DDPO_SF = ddpo(form='sf', lr=0.001)", "grpo(window=5)"])
    assert [(name, settings.agent) for name, *_, settings in plan.runs()] == [
        ("DDPO_SF", ddpo.Config(form="sf", lr=0.001)),
        ("grpo(window=5)", grpo.Config(window=5)),
    ]
    assert plan.default_name == "compare-ddpo-grpo"


def test_how_rewards_are_called_is_the_same_for_all():
    care = {"reward_failures": "mask", "max_failed": 0.3, "reward_timeout_s": 9.0, "reward_cache": 50}
    for _, _, _, settings in Compare(agents=["ddpo", "grpo"], **care).runs():
        assert {name: getattr(settings, name) for name in care} == care


def test_who_cannot_leave_a_sample_out_is_named_and_stops_nobody_else():
    agents = ["ddpo", "by gradient = draft", "qsm", "qsm(q='noised')"]
    plan = Compare(agents=agents, reward_failures="mask")
    assert plan.unmasked() == ["by gradient", "qsm(q='noised')"]
    held = {name: settings.reward_failures for name, *_, settings in plan.runs()}
    assert held == {"ddpo": "mask", "by gradient": "error", "qsm": "mask", "qsm(q='noised')": "error"}
    assert "an error for by gradient, qsm(q='noised')." in _head(terms(plan, Path("it")), True)
    assert not Compare(agents=agents).unmasked()
    assert "fails" not in _head(terms(Compare(agents=agents), Path("it")), True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"agents": ["ddppo"]}, "did you mean 'ddpo'"),
        ({"agents": ["grpo(windw=3)"]}, "did you mean 'window'"),
        ({"agents": ["grpo(window=-3)"]}, "window = -3"),
        ({"agents": ["ddpo(form='iss')"]}, "form = iss of agent 'ddpo': expected one of 'is', 'sf'"),
        ({"agents": ["mine = ddppo"]}, "did you mean 'ddpo'"),
        ({"agents": ["ddpo", "ddpo"]}, "expected each once"),
        ({"agents": ["it = ddpo", "it = grpo"]}, "expected each once"),
        ({"agents": []}, "one of each at least"),
        ({"best_of": [1]}, r"best_of = \[1\]"),
        ({"seeds": 0}, "seeds = 0"),
        ({"rewards": ["ink", "symmetry", "ink"]}, r"rewards = .*: expected each once, 'ink' is there twice"),
        ({"best_of": [4, 4]}, r"best_of = \[4, 4\]: expected each once"),
        ({"guidance": [1.0, 2.0, 1.0]}, "guidance = .*: expected each once"),
        ({"rewards": ["ink"], "reward_options": {"symmetry": {}}}, "unknown reward in the options 'symmetry'"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Compare(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rewards": ["ink", "inkk"]}, "unknown reward 'inkk'.*did you mean 'ink'"),
        ({"rewards": ["ink", "nowhere.py:f"]}, "nowhere.py"),
        ({"rewards": ["ink", "jpeg_compressibility"], "reward_options": {"jpeg_compressibility": {"qualty": 3}}},
         "did you mean 'quality'"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_made_is_refused_before_the_others_are_learned_from(settings, said):
    """The baselines ask every reward, after all runs."""
    with pytest.raises(ConfigError, match=said):
        check(Compare(agents=["ddpo"], **settings))
    refused = check(Compare(agents=["draft"], rewards=["ink", "jpeg_compressibility"]))
    assert ["draft on jpeg_compressibility" in message for message in refused] == [True]


def test_figures_by_hand(tmp_path):
    def line(step, reward, frechet):
        names = {"reward": reward, "reward_std": 0.5, "agreement": 0.9, "frechet": frechet, "diversity_relative": 1.0}
        return json.dumps({"step": step, **{f"evaluation/{k}": v for k, v in names.items()}})

    rows = [line(0, 1.0, 4.0), json.dumps({"step": 1, "train/reward": 9}), line(1, 1.5, 11.0), line(2, 2.25, 13.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    laps = [{"step": n, "queries": 7 * n, "seconds": 2.0 * n, "cpu_seconds": 1.0 * n} for n in (1, 2)]
    (tmp_path / "timing.jsonl").write_text("\n".join(map(json.dumps, laps)))
    points = curve(tmp_path)
    assert [(p.queries, p.seconds, p.gain) for p in points] == [(0, 0.0, 0.0), (7, 2.0, 1.0), (14, 4.0, 2.5)]
    assert first_at(points, 2.0) is points[2]
    assert first_at(points, 2.6) is None
    assert best_within(points, 3 * points[0].frechet) is points[1]
    assert best_within(points, 10.0) is None


def test_no_sentence_and_no_base_without_diversity_breaks_a_table():
    base = {"reward": 1.0, "reward_std": 0.0, "diversity": 0.0, "brightness": 0.5, "edge_density": 0.1, "entropy": 2.0}
    told = terms(Compare(agents=["ddpo"], rewards=["ink"]), Path("it"))
    columns = list(_columns(told, base))
    failed = Outcome("ddpo", "ink", 0, [], "failed: max |log ratio| = 30 nats\n  in step 3")
    cells = [_row(told, columns, "ddpo", [failed]), _baseline(columns, "guidance 3", "refused: a | b", base)]
    cells.append(_baseline(columns, "base", base, base))
    table = Table("ink", ["", *(column.head for column in columns)], cells)
    rows = table.markdown().splitlines()[-3:]
    assert [row.replace(r"\|", "").count("|") for row in rows] == [len(columns) + 2] * 3
    assert r"max \|log ratio\| = 30 nats in step 3" in rows[0]
    assert " 0.00 | 0.500 " in rows[2]
    read = list(csv.reader(table.csv().splitlines()))
    assert {len(row) for row in read} == {len(columns) + 2}
    assert read[2][:3] == ["ink", "guidance 3 (no training)", "refused: a | b"]


def test_the_stopwatch_goes_on_where_it_was(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.process_time", lambda: now[0] / 2)
    watch = Stopwatch(tmp_path, 0)
    for step in (1, 2):
        now[0] += 3
        watch.lap(step, 10 * step)
        now[0] += 100  # an evaluation
        watch.go()
    again = Stopwatch(tmp_path, 1)
    now[0] += 4
    again.lap(2, 20)
    lines = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "queries": 10, "seconds": 3.0, "cpu_seconds": 1.5},
        {"step": 2, "queries": 20, "seconds": 7.0, "cpu_seconds": 3.5},
    ]


def test_the_best_of_n_is_chosen_by_the_reward():
    torch.manual_seed(0)
    net = ResidualMLP((1, 8, 8), 10, width=16, depth=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    train, held_out = digits().split(0.5)
    judged = Judged(train, held_out, Classifier(JUDGE.kind, (1, 8, 8), 10).eval())

    def bright(x, cond):
        return x.flatten(1).mean(1)

    found = dict(
        baselines(
            Denoiser(net, Cosine(), "v"), Chain(steps=3), judged, Scored(bright, "reward"), Tries(60, [2, 4], [1.0])
        )
    )
    assert list(found) == ["base", "best of 2", "best of 4", "guidance 1"]
    assert found["base"]["reward"] < found["best of 2"]["reward"] < found["best of 4"]["reward"]


def test_failed_rewards_are_left_out_of_the_baselines():
    torch.manual_seed(0)
    train, held_out = digits().split(0.5)
    judged = Judged(train, held_out, Classifier(JUDGE.kind, (1, 8, 8), 10).eval())
    model = Denoiser(ResidualMLP((1, 8, 8), 10, width=16, depth=1), Cosine(), "v")

    def picky(x, cond):
        value = x.flatten(1).mean(1)
        return value.masked_fill(value > value.quantile(0.9), math.nan)

    with pytest.raises(RewardError, match="not finite for 6 of 60"):
        dict(baselines(model, Chain(steps=2), judged, Scored(picky, "reward"), Tries(60, [], [])))
    found = dict(baselines(model, Chain(steps=2), judged, Scored(picky, "reward", 0.2), Tries(60, [3], [])))
    assert math.isfinite(found["base"]["reward"])
    assert found["best of 3"]["reward"] > found["base"]["reward"]


def test_the_whole_command(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    agents = "ddpo(micro_batch=64),ddpo(advantage='prompt', micro_batch=64),grpo(window=2, micro_batch=64)"
    words = ("compare", "--agents", agents, "--rewards", "ink,jpeg_compressibility", *SMALL, *RUNS, "--name", "it")
    said = rlfusion(tmp_path, *words)
    assert said.code == 0, said.err
    folder = tmp_path / "runs" / "it"
    page = (folder / "comparison.md").read_text()
    for text in (
        "## ink",
        "## jpeg_compressibility",
        "best of 4 (no training)",
        "guidance 1 (no training)",
        "grpo(window=2",
    ):
        assert text in page
    assert page in said.out
    for picture in ("ink.png", "jpeg_compressibility.png"):
        assert (folder / picture).stat().st_size > 10_000
    outcomes = json.loads((folder / "comparison.json").read_text())
    assert len(outcomes) == 3 * 2 * 2
    assert all(o["points"][-1]["queries"] == 60 for o in outcomes), "two rollouts of 24, and one that is cut to 12"
    run = next(folder.glob("grpo*-ink-seed1"))
    events = EventAccumulator(str(run)).Reload()
    shown = [(e.step, round(e.value, 4)) for e in events.Scalars("compare_ink/gain by queries")]
    points = next(o for o in outcomes if "grpo" in o["agent"] and (o["reward"], o["seed"]) == ("ink", 1))["points"]
    assert shown == [(p["queries"], round(p["gain"], 4)) for p in points]
    told = HParamsPluginData.FromString(events.SummaryMetadata(EXPERIMENT_TAG).plugin_data.content).experiment
    columns, metrics = ({info.name for info in told.hparam_infos}, [info.name.tag for info in told.metric_infos])
    assert {*COLUMNS, "with agent.window", "with agent.advantage"} <= columns, "those of the other runs, too"
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("final/")} <= set(metrics)
    assert metrics[0] == "final/gain"

    assert {run.state for run in stored_runs.found([str(folder)])} == {"finished"}
    before = {file: file.read_bytes() for file in folder.glob("*/metrics.jsonl")}
    again = rlfusion(tmp_path, "compare", "--resume", "runs/it")
    assert again.code == 0, again.err
    assert {file: file.read_bytes() for file in folder.glob("*/metrics.jsonl")} == before
    assert (folder / "comparison.md").read_text() == page
    assert stored_runs.read(folder).state == "finished"


def test_a_run_that_fails_keeps_the_evaluations_that_it_had(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    stop = ("--guard.action", "halt", "--guard.log_ratio", 1e-9)
    said = rlfusion(tmp_path, "compare", "--agents", "ddpo", "--rewards", "ink", *SMALL, *RUNS, *stop, "--name", "it")
    assert said.code == 0, said.err
    folder = tmp_path / "runs" / "it"
    outcomes = json.loads((folder / "comparison.json").read_text())
    assert [len(o["points"]) for o in outcomes] == [1, 1]
    assert all(o["problem"].startswith("failed: rollout 1: max |log ratio|") for o in outcomes)
    assert "ddpo (seed 0 failed: rollout 1" in (folder / "comparison.md").read_text()


def test_an_agent_that_cannot_serve_is_a_cell_that_says_so(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    agents = "grpo(window=99),ddpo(micro_batch=64)"
    said = rlfusion(tmp_path, "compare", "--agents", agents, "--rewards", "ink", *SMALL, *RUNS, "--name", "it")
    assert said.code == 0, said.err
    assert "refused: window = 99" in (tmp_path / "runs" / "it" / "comparison.md").read_text()
    none = rlfusion(tmp_path, "compare", "--agents", "grpo(window=99)", "--rewards", "ink", *SMALL, "--name", "no")
    assert none.code == 2
    assert "window = 99" in none.err
    assert not (tmp_path / "runs" / "no").exists()


FINE = "hundredths of a CPU second"
AXES = {"gain by queries", f"gain by {FINE}", "diversity by queries"}


def test_a_pretrained_pipeline_with_adapters(tiny_pipelines, tmp_path, monkeypatch, capsys):
    """No data and no judge: diversity and image statistics in their place. The base is the pipeline, and stays it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\n")
    draft = "draft(lr=0.01, micro_batch=8, updates_per_epoch=2)"
    words = ["--agents", f"DRaFT = {draft},ddpo(micro_batch=8),grpo(window=9)", "--rewards", "tiny_pipelines:warm"]
    model = ["--model", str(tiny_pipelines["sd"]), "--pipeline.prompts", "prompts.txt", "--pipeline.size", "16"]
    small = ["--chain.steps", "3", "--rollout.prompts", "2", "--rollout.samples_per_prompt", "4"]
    small += ["--budget_queries", "24", "--evaluations", "3", "--evaluation.samples", "50", "--best_of", "[2]"]
    lora = ["--lora", "LoRA(rank=2, dropout=0.1)", "--monitor.samples", "50"]
    assert main.main(["compare", *model, *words, *small, *lora, "--name", "it"]) == 0
    said, folder = capsys.readouterr(), tmp_path / "runs" / "it"
    page = (folder / "comparison.md").read_text()
    assert page.strip() in said.out
    assert "warning: noise of standard deviation below 0.05 at step 2 of 3: 0.04" in " ".join(said.err.split())
    first, _, paired = page.partition(": differences of these runs, by seed and prompt")
    assert "| DRaFT - best of 2 | " in paired
    table = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")]
    assert {len(cells) for cells in table[:-1]} == {len(table[0])}
    assert table[0][-3:] == ["brightness", "edge density", "entropy |"]
    rows = {cells[0].strip("| "): cells for cells in table[1:]}
    assert {"base (no training)", "best of 2 (no training)", "guidance 3 (no training)", "DRaFT"} < rows.keys()
    assert float(rows["best of 2 (no training)"][4]) > 0
    assert "refused: window = 9" in rows["grpo(window=9)"][1]
    points = {o["agent"]: o["points"] for o in json.loads((folder / "comparison.json").read_text())}
    assert points["DRaFT"][-1]["gain"] > 0.3
    assert [p["queries"] for p in points["DRaFT"]] == [0, 8, 16, 24]
    assert {p["frechet"] for run in points.values() for p in run} == {None}
    assert (folder / "tiny_pipelines-warm.png").stat().st_size > 10_000
    run = next(folder.glob("DRaFT*"))
    tags = {tag.partition("/")[2] for tag in EventAccumulator(str(run)).Reload().Tags()["scalars"]}
    assert {tag for tag in tags if " by " in tag} == AXES
    assert (run / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_guidance_that_a_model_does_not_know_is_a_row_that_says_so(tiny_pipelines):
    settings = pipelines.Settings(prompts="a red cat", size=16).about(str(tiny_pipelines["flux"]), "", None)[0]
    schnell = pipelines.build(settings, ["a red cat"])
    schnell.weights = None  # as of a network that does not read the guidance
    schnell.net.family = replace(schnell.net.family, answer=lambda model, x, t, c: x)
    chain = Chain(steps=2, spacing="model")
    found = dict(
        baselines(schnell, chain, Unjudged((3, 16, 16), ("a red cat",)), Scored(mean, "reward"), Tries(4, [], [3.0]))
    )
    assert found["guidance 3"].startswith("refused: guidance = 3.0: this model reads no guidance weight")
    assert found["base"]["diversity"] > 0


def mean(samples, cond):
    return samples.flatten(1).mean(1)


@pytest.mark.parametrize(("fine", "unit", "axis"), [(False, "CPU seconds", [2, 4]), (True, FINE, [152, 449])])
def test_seconds_are_whole_and_of_short_runs_hundredths(tmp_path, fine, unit, axis):
    points = [Point(n, n, 9.0, seconds, 0.1 * n, 0.5, 0.9, 3.0, 0.8, {}) for n, seconds in ((0, 1.519), (1, 4.49))]
    _overlay(tmp_path, Outcome("ddpo", "ink", 0, points, ""), fine)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars(f"compare_ink/gain by {unit}")] == axis
    assert not any(" by CPU" in tag for tag in events.Tags()["scalars"]) or not fine
    (shown,) = COMPARED["runs beside one another"]["gain by CPU seconds of training, or hundredths"]
    assert [tag for tag in events.Tags()["scalars"] if re.fullmatch(shown, tag)] == [f"compare_ink/gain by {unit}"]


def test_the_curves_of_a_run_that_went_on_are_drawn_again(tmp_path):
    def drawn(*queries: int) -> list[int]:
        points = [Point(n, n, 1.0, 1.0, 0.1 * n, 0.5, 0.9, 3.0, 0.8, {}) for n in queries]
        _overlay(tmp_path, Outcome("ddpo", "ink", 0, points, ""), fine=False)
        files = sorted(tmp_path.glob("events*"))
        return [e.step for e in EventAccumulator(str(files[-1])).Reload().Scalars("compare_ink/gain by queries")]

    assert drawn(0, 24) == drawn(0, 24) == [0, 24]
    assert len(list(tmp_path.glob("events*"))) == 1
    assert drawn(0, 24, 48) == [0, 24, 48]
