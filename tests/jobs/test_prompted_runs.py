"""Prompts with metadata on their way through the commands, on a tiny Stable Diffusion."""

import json
from functools import partial

import pytest
import torch
import yaml
from processes import Process
from reward_servers import serving

from rlfusion.cli import main
from rlfusion.cli.arguments import settings_of
from rlfusion.common import notices
from rlfusion.common.errors import ConfigError
from rlfusion.config import CheckReward, Serve
from rlfusion.jobs import runs
from rlfusion.jobs.check_reward import check_reward
from rlfusion.jobs.finetune.checks import check_pretrained
from rlfusion.jobs.resuming import settings_of_run
from rlfusion.jobs.serve_reward import make_service
from rlfusion.models import describe
from rlfusion.models.pipelines import Settings
from rlfusion.rewards import build, task_info
from rlfusion.training.identity import Record, enter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROWS = [{"prompt": "a red cat", "tag": "x", "count": 3}, {"prompt": "two dogs", "tag": "y", "count": 50}]
REWARD = """
def brightness(images, prompts, metadata):
    assert all(held == {"a red cat": {"tag": "x", "count": 3}, "two dogs": {"tag": "y", "count": 50}}[words]
               for words, held in zip(prompts, metadata))
    return images.mean((1, 2, 3)) * images.new_tensor([held["count"] for held in metadata]), {}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notices, "_said", set())
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "mine.py").write_text(REWARD)
    return tmp_path


def test_a_run_writes_down_its_prompts_and_their_metadata_reach_the_reward(tiny_pipelines, here):
    model = ["--model", str(tiny_pipelines["sd"]), "--pipeline.prompts", "p.jsonl", "--pipeline.size", "16"]
    settings = settings_of("finetune", [*model, "--reward", "mine.py:brightness", "--lora", "LoRA(rank=2)"])
    card = describe(settings.base, settings.pipeline)
    assert [held["count"] for held in card.metadata] == [3, 50]
    assert json.loads(json.dumps(card.to_json()))["pipeline"]["metadata"] == list(card.metadata)
    check_pretrained(settings, card)
    with runs.new_run("finetune", settings, "run") as (_, folder):
        held = yaml.safe_load((folder / "config.yaml").read_text())["pipeline"]
    assert held["prompts"] == str(here / "p.jsonl")
    assert held["prompts_sha256"] == Settings(prompts="p.jsonl").digest
    assert card.first(1).metadata == (card.metadata[0],)
    assert card.only("two dogs").names == ("two dogs",)
    assert card.only("two dogs").metadata == (card.metadata[1],)


@pytest.fixture
def begun(tiny_pipelines, here):
    """The folder of a run that has begun, on the prompts."""
    model = ["--model", str(tiny_pipelines["sd"]), "--pipeline.prompts", "p.jsonl", "--pipeline.size", "16"]
    settings = settings_of("finetune", [*model, "--reward", "mine.py:brightness", "--lora", "LoRA(rank=2)"])
    with runs.new_run("finetune", settings, "run") as (settings, folder):
        enter(folder, "finetune", settings).save(1, {})
    return folder


def resumed(folder, **changes):
    return settings_of_run("finetune", folder, changes, partial(settings_of, "finetune"))


@pytest.mark.parametrize("how", ["a text", "a fact", "one more"])
def test_prompts_that_were_edited_are_noticed_unless_that_is_meant(begun, here, how):
    rows = [dict(row) for row in ROWS]
    rows[0] |= {"a text": {"prompt": "a cat"}, "a fact": {"count": 4}}.get(how, {})
    rows += [{"prompt": "a third", "tag": "z", "count": 1}] * (how == "one more")
    file = here / "p.jsonl"
    original, old = file.read_text(), resumed(begun).pipeline.prompts_sha256
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=r"prompts = .*p.jsonl' are others than the run began with .*--change"):
        resumed(begun).pipeline.read()
    meant = resumed(begun, **{"pipeline.prompts": str(file)}).pipeline
    assert meant.read().metadata[0]["count"] == rows[0]["count"]
    record = Record.read(begun)
    assert record.changes[-1]["settings"] == {"pipeline.prompts_sha256": [old, meant.prompts_sha256]}
    assert resumed(begun).pipeline == meant
    file.write_text(original)
    with pytest.raises(ConfigError, match="others than the run began with"):
        resumed(begun).pipeline.read()


RUN = (
    *("--pipeline.prompts", "p.jsonl", "--pipeline.size", "16", "--reward", "mine.py:brightness"),
    *("--lora", "LoRA(rank=2)", "--chain.steps", "2", "--chain.spacing", "trailing", "--updates", "1"),
    *("--rollout.prompts", "2", "--rollout.samples_per_prompt", "2", "--rollout.item", "2"),
    *("--evaluation.samples", "50", "--evaluation.deterministic", "false", "--monitor.every", "0"),
)
"""A finetune whose reward counts on the metadata of each prompt, and says so where it gets others."""


def test_metadata_reach_the_reward_of_a_run_and_of_its_evaluation(tiny_pipelines, here):
    """The reward asserts, for each picture, that it has the metadata of its prompt."""
    assert main.main(["finetune", "--model", str(tiny_pipelines["sd"]), *RUN, "--name", "it"]) == 0
    before = json.loads((here / "runs" / "it" / "summary.json").read_text())["before"]
    assert before["reward"] == pytest.approx(before["brightness"] * (3 + 50) / 2, rel=0.1)
    evaluation = ("--reward", "mine.py:brightness", "--evaluation.samples", "50", "--out", "again.json")
    assert main.main(["evaluate", "--checkpoint", "runs/it", *evaluation]) == 0
    again = json.loads((here / "again.json").read_text())
    assert again["reward"] == pytest.approx(again["brightness"] * (3 + 50) / 2, rel=0.1)


@pytest.mark.alone
def test_metadata_reach_the_reward_of_a_worker(tiny_pipelines, here):
    found = {}
    for workers in (0, 1):
        more = ("--rollout.workers", workers, "--ray.cpus_per_worker", 0.5, "--name", f"of-{workers}")
        said = Process(here, "finetune", "--model", tiny_pipelines["sd"], *RUN, *more).wait()
        assert said.code == 0, said.err
        folder = here / "runs" / f"of-{workers}"
        found[workers] = (folder / "summary.json").read_text(), (folder / "metrics.jsonl").read_text()
    assert found[0] == found[1]


def test_metadata_reach_a_served_reward():
    service = make_service(Serve("mine.py:brightness"))
    info = task_info(
        [row["prompt"] for row in ROWS], (3, 16, 16), [{"tag": r["tag"], "count": r["count"]} for r in ROWS]
    )
    samples, label = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2
    with serving(None, wants=service.offer.wants, make=service.offer._make) as url:
        served = build(url, task_info=info)(samples, label)
    assert torch.equal(served, build("mine.py:brightness", task_info=info)(samples, label))
    assert torch.allclose(served, samples.mean((1, 2, 3)) * torch.tensor([3.0, 50.0, 3.0, 50.0]))


def test_check_reward_draws_from_a_model(tiny_pipelines):
    settings = CheckReward(
        "mine.py:brightness",
        model=str(tiny_pipelines["sd"]),
        pipeline=Settings(prompts="p.jsonl", size=16),
        chain=settings_of("finetune", ["--model", str(tiny_pipelines["sd"]), "--chain.steps", "2"]).chain,
        samples=8,
    )
    found = {finding.check: finding for finding in check_reward(settings)}
    assert {check: finding.verdict for check, finding in found.items()} == {
        "answers": "ok", "range": "ok", "input": "ok", "repeats": "ok", "batch": "ok", "condition": "note",
        "gradient": "ok", "speed": "ok",
    }  # fmt: skip
    assert found["condition"].message == "another prompt changes 8 of 8"


def test_a_missing_gradient_is_a_note(here, capsys):
    (here / "mine.py").write_text("def grey(images):\n    return images.detach().mean((1, 2, 3))\n")
    assert main.main(["check-reward", "mine.py:grey", "--samples", "4"]) == 0
    assert "none: not for agents that learn through it" in " ".join(capsys.readouterr().out.split())
    assert main.main(["check-reward", "mine.py:grey", "--pipeline.prompts", "p.jsonl"]) == 2
    assert "without a model" in capsys.readouterr().err
    assert torch.is_grad_enabled()
