"""rollout.prompts, where nobody sets it, is 10 or as many prompts as there are; what is typed is held to them."""

import numpy as np
import pytest
import yaml

from rlfusion.cli import main
from rlfusion.cli.arguments import settings_of
from rlfusion.config import to_yaml


@pytest.fixture
def few(tmp_path):
    """A file of 3 classes of 40 images each."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (120, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", x=x, label=np.arange(120) % 3)
    return tmp_path / "few.npz"


@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_the_default_is_as_many_classes_as_there_are_and_is_written_down(command, few, tmp_path):
    settings = settings_of(command, ["--pretrain.data", str(few)])
    assert settings.rollout.prompts == 3
    assert yaml.safe_load(to_yaml(settings))["rollout"]["prompts"] == 3
    file = tmp_path / "settings.yaml"
    file.write_text(f"pretrain: {{data: {few}}}\n")
    assert settings_of(command, ["--config", str(file)]).rollout.prompts == 3
    assert settings_of(command, []).rollout.prompts == 10


def test_other_settings_are_held_to_it(few):
    assert settings_of("finetune", ["--pretrain.data", str(few), "--budget_queries", "72"]).rollout.prompts == 3


def test_what_is_typed_is_refused_where_it_is_too_many(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = settings_of("finetune", ["--pretrain.data", str(few), "--rollout.prompts", "10"])
    assert typed.rollout.prompts == 10
    small = ("--pretrain.data", str(few), "--pretrain.held_out", "0.5", "--pretrain.model.net", "ResidualMLP(width=8)")
    assert main.main(["finetune", *small, "--rollout.prompts", "10"]) == 2
    assert "rollout.prompts = 10: expected at most the 3 prompts" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11])
def test_a_pipelines_default_is_as_many_prompts_as_its_file_has(count, tiny_pipelines, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"picture {n} {'x' * 1500}\n" for n in range(count)))
    words = ["--model", str(tiny_pipelines["sd"]), "--pipeline.prompts", str(file), "--lora", "LoRA()"]
    assert settings_of("finetune", words).rollout.prompts == (10 if count == 1 else min(10, count))
