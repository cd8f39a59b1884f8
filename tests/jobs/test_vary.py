"""``rlfusion compare --vary``: any setting of the runs, what is refused, and the command from end to end."""

import json
import re
from pathlib import Path

import pytest
from tiny_runs import TINY

from rlfusion.agents import ddpo, grpo
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config import Compare, Finetune
from rlfusion.config.vary import ELSEWHERE, changed
from rlfusion.jobs.compare.job import check, terms
from rlfusion.jobs.compare.members import LONGEST_NAME, slug


def test_every_agent_meets_every_combination():
    words = ["--agents", "ddpo,x = grpo(window=3)", "--vary", "agent.lr=1e-4,3e-4", "--vary=chain.steps=10,20"]
    config = settings_of("compare", words)
    found = {name: (s.agent, s.chain.steps) for name, *_, s in config.runs()}
    assert found == {
        f"{name} lr={lr} steps={steps}": (agent(**own, lr=lr), steps)
        for name, agent, own in (("ddpo", ddpo.Config, {}), ("x", grpo.Config, {"window": 3}))
        for lr in (0.0001, 0.0003)
        for steps in (10, 20)
    }
    assert config.default_name == "compare-ddpo-grpo-by-lr-by-steps"
    assert settings_of("compare", ["--config", "{agents: [ddpo], vary: {agent.lr: [1e-4, 3e-4]}}"]).vary == {
        "agent.lr": [0.0001, 0.0003]
    }
    told = terms(config, Path("it"))
    assert told.agents == list(found)
    assert told.differing["x lr=0.0003 steps=10"]["lr"] == "0.0003"


def test_without_varied_values_nothing_changes():
    plain = Compare(agents=["ddpo"])
    (varied,) = Compare(agents=["ddpo"], vary={"agent.lr": [ddpo.Config().lr]}).runs()
    (usual,) = plain.runs()
    assert varied[-1] == usual[-1]
    assert plain.rows()[0].name == "ddpo"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("chain.kernel=DDIM(eta=0.5),DDPM(variance='small')", ["DDIM(eta=0.5)", "DDPM(variance='small')"]),
        ("lora='',LoRA(rank=2, alpha=4)", ["", "LoRA(rank=2, alpha=4)"]),
        ("monitor.held_out=[ink],[ink,symmetry]", [["ink"], ["ink", "symmetry"]]),
        ("monitor.kl=null,1", [None, 1]),
        ("monitor.stop=true,false", [True, False]),
        ("{rollout.lag: [0, 1]}", [0, 1]),
    ],
)
def test_values_of_every_kind(text, values):
    (held,) = settings_of("compare", ["--agents", "ddpo", "--vary", text]).vary.values()
    assert held == values


def test_what_follows_from_the_budget_follows_from_the_varied_rollout():
    config = Compare(agents=["ddpo"], budget_queries=960, vary={"rollout.samples_per_prompt": [24, 48]})
    assert [s.updates for *_, s in config.runs()] == [4, 2]
    masked = Compare(agents=["qsm"], reward_failures="mask", vary={"agent.q": ["noised"]})
    assert masked.unmasked() == ["qsm q=noised"]
    assert next(masked.runs())[-1].reward_failures == "error"


def test_a_setting_of_the_agent_that_is_varied_is_no_longer_in_its_name():
    rows = settings_of("compare", ["--agents", "ddpo(lr=0.1, epochs=2)", "--vary", "agent.lr=0.2,0.3"]).rows()
    assert [row.name for row in rows] == ["ddpo(epochs=2) lr=0.2", "ddpo(epochs=2) lr=0.3"]
    alike = Compare(
        agents=["ddpo"], vary={"agent.micro_batch": [64], "ray.limits.item_s": [900.0], "rollout.item": [60]}
    )
    assert alike.rows()[0].name == "ddpo micro_batch=64 item_s=900.0 item=60"
    twice = Compare(agents=["ddpo"], vary={"guard.patience": [5], "monitor.patience": [6]})
    assert twice.rows()[0].name == "ddpo guard.patience=5 monitor.patience=6"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agent.lrr=1,2"], r"unknown setting of agent 'ddpo' to vary 'lrr'.*did you mean 'lr'\?"),
        (["agentt.lr=1,2"], r"unknown setting to vary 'agentt\.lr'.*did you mean 'agent\.lr'\?"),
        (["lr=1,2"], r"unknown setting to vary 'lr'; did you mean 'agent\.lr'\?"),
        (["rollout=1"], "unknown setting to vary 'rollout'"),
        (["agent.clip=0.1"], "unknown setting of agent 'draft' to vary 'clip'"),
        (["agent.lr=a"], r"vary agent\.lr = a of agent 'ddpo': expected float"),
        (["agent.lr=-1"], "vary agent 'ddpo': lr = -1: expected a number > 0"),
        (["chain.steps=0"], "vary chain.steps = 0"),
        (["agent.lr=1e-4,0.0001"], "expected one value at least, and each once"),
        (["agent.lr"], "expected --vary SETTING=VALUE,VALUE"),
        (["agent.lr="], "expected --vary SETTING=VALUE,VALUE"),
        (["agent.lr=1,,2"], "a value is empty"),
        (["agent.lr=1", "agent.lr=2"], r"--vary agent\.lr is given twice"),
        (["{agent.lr: 1}"], r"vary = \{'agent\.lr': 1\}: expected a mapping \{name: a list"),
        (["{agent.lr: []}"], "expected one value at least"),
        (["rollout.samples_per_prompt=500"], r"vary: ddpo samples_per_prompt=500: budget_queries = 2400"),
    ],
)
def test_what_cannot_be_varied_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [part for word in words for part in ("--vary", word)]
    assert main(["compare", "--agents", "ddpo,draft", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("agent", "agent.name", "reward", "rewards", "reward_options.ink.x", "seed", "seeds", "budget_queries"),
        *("updates", "checkpoint_every", "base", "pretrain.data", "pipeline.size", "evaluation.samples"),
        *("monitor.every", "root", "name", "learner.ranks"),
    ],
)
def test_what_the_comparison_says_itself_is_not_varied(name):
    with pytest.raises(ConfigError, match=rf"vary {re.escape(name)}: .*; expected another setting"):
        Compare(vary={name: [1, 2]})
    assert any(re.fullmatch(pattern, name) for pattern, _ in ELSEWHERE)


def test_every_other_setting_of_a_run_can_be_varied():
    usual = Finetune()
    for name, value in (("guard.patience", 5), ("ray.limits.item_s", 900.0), ("precision", "bfloat16")):
        parts = {field: getattr(usual, field) for field in Finetune.__dataclass_fields__}
        held = changed(Finetune, parts, {name: value})
        for part in name.split("."):
            held = held[part] if isinstance(held, dict) else getattr(held, part)
        assert held == value


def test_a_value_that_cannot_work_where_another_can_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="vary: grpo window=99 on ink cannot run: window = 99"):
        check(Compare(agents=["grpo"], rewards=["ink"], vary={"agent.window": [2, 99]}))
    cells = check(Compare(agents=["ddpo", "draft"], rewards=["jpeg_compressibility"], vary={"agent.lr": [1e-4, 1e-3]}))
    assert len(cells) == 2
    assert all("draft lr=" in cell for cell in cells)


def test_no_two_runs_share_a_folder():
    with pytest.raises(ConfigError, match="would both be in 'a-b-ink-seed0': expected names that differ more"):
        check(Compare(agents=["a b = ddpo", "a-b = grpo"], rewards=["ink"]))
    long = [slug("x" * 200 + str(n)) for n in range(2)]
    assert len(set(long)) == 2
    assert max(map(len, long)) <= LONGEST_NAME


def test_the_command(tiny_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    monkeypatch.chdir(tmp_path)
    small = [
        *TINY[: TINY.index("--updates")],
        *TINY[TINY.index("--rollout.prompts") : TINY.index("--agent.micro_batch")],
    ]
    few = [
        "--budget_queries",
        48,
        "--evaluations",
        1,
        "--evaluation.samples",
        60,
        "--guidance",
        "[]",
        "--best_of",
        "[]",
    ]
    words = ["--agents", "ddpo(micro_batch=64)", "--rewards", "ink", "--vary", "agent.lr=1e-3,2e-2", *small, *few]
    assert main(["compare", *map(str, words), "--name", "it", "--monitor.every", "0"]) == 0
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "it"
    names = [f"ddpo(micro_batch=64) lr={lr}" for lr in ("0.001", "0.02")]
    assert all(f"| {name} |" in said for name in names)
    assert all(name in (folder / "report.html").read_text() for name in names)
    outcomes = {o["agent"]: o["points"][-1]["gain"] for o in json.loads((folder / "comparison.json").read_text())}
    assert list(outcomes) == names
    assert len(set(outcomes.values())) == 2
    runs = sorted(folder.glob("*seed0"))
    assert [json.loads((run / "run.json").read_text())["settings"]["agent.lr"] for run in runs] == [0.001, 0.02]
    before = {file: file.read_bytes() for file in folder.glob("*/metrics.jsonl")}
    (runs[1] / "summary.json").unlink()
    assert main(["compare", "--resume", str(folder)]) == 0
    assert {file: file.read_bytes() for file in folder.glob("*/metrics.jsonl")} == before
