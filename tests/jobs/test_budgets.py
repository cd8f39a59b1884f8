"""The budget of queries: what a run may ask for, to the last whole prompt."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY

from rlfusion.agents import ddpo, draft, grpo
from rlfusion.cli.main import main
from rlfusion.config import Compare, Finetune, Rollout
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.parts import Collecting
from rlfusion.rl.agent import Plan

ROLLOUT = Rollout(prompts=4, samples_per_prompt=6)


def config(budget: int, agent=None) -> Finetune:
    return Finetune(budget_queries=budget, rollout=ROLLOUT, agent=agent or ddpo.Config(updates_per_epoch=2))


@pytest.mark.parametrize("budget", [24, 29, 30, 47, 48, 60, 61, 71, 72, 1000])
@pytest.mark.parametrize("asked", [0, 24])
def test_rollouts_ask_for_all_of_it_and_never_for_more(budget, asked):
    left = config(budget).left(asked)
    assert left == (budget - asked) // 6 * 6
    held = Collector(None, Collecting(0, ROLLOUT, 99, 8), None, 10, 3, torch.device("cpu"))
    held.left = left
    sizes = [held.prompts_of(step) for step in range(3, 99)]
    assert 6 * sum(sizes) == left
    assert all(size == 4 for size in sizes[: left // 24])
    assert sum(0 < size < 4 for size in sizes) <= 1
    assert held.prompts_of(-1) == 4, "what is tried before is as large as ever"
    step = 3 + left // 24
    if sizes[step - 3]:
        whole, few = Collector(None, held.spec, None, 10, 3, torch.device("cpu")).items(step, 0), held.items(step, 0)
        groups = [group for item in whole for group in item.groups]
        assert [group for item in few for group in item.groups] == groups[: 6 * sizes[step - 3]], "the first prompts"


def test_who_cannot_learn_from_so_few_walks_ends_before():
    greedy = ddpo.Config(updates_per_epoch=24)
    assert config(60, greedy).left(0) == 48
    assert config(60, replace(greedy, updates_per_epoch=12)).left(0) == 60
    assert config(60, draft.Config()).left(0) is None, "it asks as it learns"
    assert config(0).left(0) is None


def test_a_comparison_has_a_cut_rollout_where_one_is_left():
    def updates(budget: int, agent: str = "ddpo") -> list[int]:
        plan = Compare(agents=[agent], rollout=ROLLOUT, budget_queries=budget)
        return [settings.updates for *_, settings in plan.runs()]

    assert [updates(budget) for budget in (48, 53, 54, 71, 72)] == [[2], [2], [3], [3], [3]]
    assert updates(54, "draft") == [2]
    plan = Compare(agents=["ddpo"], rollout=ROLLOUT, budget_queries=240, evaluations=10)
    assert [(s.evaluation.every, s.checkpoint_every) for *_, s in plan.runs()] == [(1, 1)]
    assert next(replace(plan, budget_queries=500, evaluations=5).runs())[-1].evaluation.every == 4


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_asks_for_all_of_its_budget_and_resumes_bit_for_bit(tiny_root, tmp_path, monkeypatch, capsys, lag):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "--reward", "ink", "--budget_queries", 90, "--monitor.every", 0, "--checkpoint_every", 2]
    words += ["--rollout.lag", lag, "--agent.micro_batch", 64]
    assert main(["finetune", *map(str, words), "--name", "it"]) == 0
    folder = tmp_path / "runs" / "it"
    assert "stopped after 4 updates: 90 of its budget of 90 queries are spent" in capsys.readouterr().err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/queries"] for line in lines if "train/queries" in line] == [24, 48, 72, 90]
    assert json.loads((folder / "summary.json").read_text())["queries"] == 90
    before = _bytes(folder)
    for name in ("summary.json", "model/weights.safetensors"):
        (folder / name).unlink()
    assert main(["finetune", "--resume", str(folder)]) == 0
    assert _bytes(folder) == before


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("metrics.jsonl", "model/weights.safetensors", "summary.json")
    }


def test_a_budget_that_was_spent_asks_for_no_more(tiny_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    monkeypatch.chdir(tmp_path)
    words = [*map(str, TINY), "--reward", "ink", "--monitor.every", "0", "--name", "it"]
    assert main(["finetune", *words]) == 0
    change = ["--change", "updates=9", "--change", "budget_queries=144"]
    assert main(["finetune", "--resume", "runs/it", *change]) == 0
    assert "stopped after 6 updates: 144 of its budget of 144 queries are spent" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs" / "it" / "summary.json").read_text())["queries"] == 144


@pytest.mark.parametrize("agent", [ddpo, grpo])
def test_agents_are_asked_whether_they_take_it(agent):
    seen = []

    class Asked(agent.Config):
        def check(self, plan: Plan) -> None:
            seen.append(plan.walks)

    config(60, Asked()).left(0)
    assert seen == [24, 12]
