"""Settings of TRL's DDPO and AlignProp and of ddpo-pytorch as ours: every one is mapped, or named with its reason."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config import Finetune, with_agent
from rlfusion.jobs.imports import PROGRAMS, imported, table_of
from rlfusion.jobs.imports.ddpo_pytorch import DDPO_PYTORCH
from rlfusion.jobs.imports.job import CLASSES
from rlfusion.jobs.imports.table import Program, Row
from rlfusion.jobs.imports.trl import TRL_ALIGNPROP, TRL_DDPO
from rlfusion.training.deciding import plain
from rlfusion.training.tracking import flatten

ALL = (TRL_DDPO, TRL_ALIGNPROP, DDPO_PYTORCH)
ROWS = [(program, row) for program in ALL for row in program.rows]
PAGE = Path(__file__).parents[2] / "docs" / "migration.md"

OTHER = {
    "log_with": "wandb",
    "mixed_precision": "bf16",
    "prompt_fn": "from_file",
    "prompt_fn_kwargs": {"path": "animals.txt"},
    "reward_fn": "aesthetic_score",
    "truncated_rand_backprop_minmax": (10, 20),
    "truncated_backprop_timestep": 40,
    "per_prompt_stat_tracking": None,
}
"""Another value than the default, where that is no number, text or truth."""

BESIDE = {
    "prompt_fn": {"prompt_fn_kwargs": {"path": "a.txt"}},
    "prompt_fn_kwargs": {"prompt_fn": "from_file"},
    "tracker_project_name": {"log_with": "wandb"},
    "truncated_backprop_timestep": {"truncated_backprop_rand": False},
    "train_batch_size": {"sample_batch_size": 4},
    "train_gradient_accumulation_steps": {"sample_batch_size": 4},
    "train.batch_size": {"sample.batch_size": 4},
    "train.gradient_accumulation_steps": {"sample.batch_size": 4},
}
"""What has to be set beside a setting for it to act."""


def other(program: Program, row: Row):
    """A value of a setting that is not its default."""
    if row.name in OTHER and not (program is TRL_DDPO and row.name == "per_prompt_stat_tracking"):
        return OTHER[row.name]
    known = row.default
    if isinstance(known, bool):
        return not known
    if isinstance(known, int | float):
        return 2 * known or 3 if isinstance(known, int) else known / 2
    return {"some": 1} if isinstance(known, dict) else "another"


def made(program: Program, **given) -> tuple[dict, list[str]]:
    return program.mapped(program.complete(given))


@pytest.mark.parametrize(("program", "row"), ROWS, ids=[f"{program.name}-{row.name}" for program, row in ROWS])
def test_every_setting_acts_on_what_its_row_says_or_is_named_with_its_reason(program, row, tmp_path):
    beside = BESIDE.get(row.name, {})
    beside = {name: value for name, value in beside.items() if name in program.known}
    before, _ = made(program, **beside)
    after, _ = made(program, **beside | {row.name: other(program, row)})
    moved = {name for name in {*before, *after} if before.get(name, 0) != after.get(name, 0)}
    if row.ours:
        assert moved
        assert moved <= {
            *row.ours.split(),
            "pipeline.vae_dtype",
            "pipeline.dtype",
            "agent.updates_per_epoch",
            "agent.steps",
        }
        assert set(row.ours.split()) & moved
        return
    assert not moved
    assert row.why
    file = tmp_path / "theirs.json"
    name = next(name for name, programs in PROGRAMS.items() if programs == (program,))
    file.write_text(json.dumps({row.name: other(program, row)}))
    assert f"{row.name} has no counterpart: {row.why}" in imported(name, str(file)).said


@pytest.mark.parametrize("program", ALL, ids=[program.name for program in ALL])
def test_ours_are_settings_of_finetune_with_values_that_it_takes(program):
    agent = made(program)[0]["agent.name"]
    known = flatten(plain(with_agent(agent)()))
    for row in program.rows:
        assert all(name in known or f"{name}.name" in known for name in row.ours.split()), row.name
    assert set(made(program)[0]) - {"reward", "pipeline.prompts"} <= set(known)


def test_ddpo_as_trl_says_it_in_its_readme(tmp_path, capsys):
    """The example of TRL's documentation: 6 x 4 walks an epoch in steps of 3, 32 rewards of a prompt kept."""
    (tmp_path / "run.sh").write_text(
        "accelerate launch --num_processes 1 examples/scripts/ddpo.py \\\n  --num_epochs 200 \\\n"
        "  --train_gradient_accumulation_steps=1 --sample_num_steps 50 --sample_batch_size 6 --train-batch-size 3 \\\n"
        "  --sample_num_batches_per_epoch 4 --per_prompt_stat_tracking True --train_learning_rate 1e-4 \\\n"
        "  --per_prompt_stat_tracking_buffer_size 32 --tracker_project_name 'sd' --log_with wandb  # as it is there\n"
    )
    out = tmp_path / "ours.yaml"
    assert main(["import-config", "trl", str(tmp_path / "run.sh"), "--out", str(out)]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "missing: reward: TRL's reward function is code" in told
    held = yaml.safe_load(out.read_text())
    assert held["updates"] == 200
    assert held["rollout"] == {"prompts": 24, "samples_per_prompt": 1, "item": 6}
    assert held["track"] == ["wandb(project='sd')"]
    assert held["chain"] == {"steps": 50, "kernel": "DDIM(eta=1.0)", "guidance_scale": 5.0}
    agent = held["agent"]
    assert (agent["updates_per_epoch"], agent["micro_batch"], agent["advantage"], agent["advantage_window"]) == (
        *(8, 3, "prompt"),
        32,
    )
    assert (agent["lr"], agent["clip"], agent["clip_per_dim"], agent["dual_clip"]) == (1e-4, 1e-4, True, None)
    with pytest.raises(SystemExit):
        main(["finetune", "--config", str(out), "--base", "", "--print_config"])
    ours = yaml.safe_load(capsys.readouterr().out)
    assert {name: ours["agent"][name] for name in agent} == agent


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "import trl\nconfig = trl.AlignPropConfig(truncated_backprop_rand=False, num_epochs=7)\n"),
        ("a.yaml", "truncated_backprop_rand: false\nnum_epochs: 7\ntrain_learning_rate: 1e-3\n"),
        ("a.json", '{"truncated_backprop_rand": false, "num_epochs": 7}'),
        ("a.txt", "--truncated_backprop_rand False --num_epochs 7"),
    ],
)
def test_alignprop_in_each_form(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    held = imported("trl", str(tmp_path / name)).settings
    assert held["updates"] == 7
    assert held["agent"] | {"lr": 1e-3, "steps": 1, "form": "last", "updates_per_epoch": 1} == held["agent"]
    assert held["agent"]["name"] == "draft"


@pytest.mark.parametrize(("span", "steps"), [((0, 50), 25), ((50, 50), 1), ((0, 0), 50), ((49, 49), 1), ((10, 20), 35)])
def test_the_mean_number_of_steps_with_gradients(span, steps):
    """For each step i of 50 a number is drawn from the span, and it has a gradient where that is at most i."""
    exact = sum((max(min(i, span[1]) - span[0] + 1, 0)) / (span[1] - span[0] + 1) for i in range(50))
    found, said = made(TRL_ALIGNPROP, truncated_rand_backprop_minmax=span)
    assert found["agent.steps"] == max(1, round(exact)) == steps
    assert any("truncated_backprop_rand" in line for line in said)


BASE = '''
import ml_collections


def get_config():
    """All."""
    config = ml_collections.ConfigDict()
    config.seed = 7
    config.train = train = ml_collections.ConfigDict()
    train.batch_size = 2
    train.adam_weight_decay = 1e-4
    config.sample = ml_collections.ConfigDict()
    config.sample.batch_size = 4
    config.per_prompt_stat_tracking = ml_collections.ConfigDict()
    config.per_prompt_stat_tracking.buffer_size = 16
    return config
'''
OVER = """
import imp
import os

base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))


def compressibility():
    config = base.get_config()
    config.num_epochs = 50
    config.per_prompt_stat_tracking = {"buffer_size": 32, "min_count": 16}
    return config


def aesthetic():
    config = compressibility()
    config.num_epochs = 200
    config.reward_fn = "aesthetic_score"
    return config
"""


def test_ml_collections_over_others(tmp_path):
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "dgx.py").write_text(OVER)
    plain_ = imported("ddpo-pytorch", str(tmp_path / "base.py")).settings
    assert (plain_["seed"], plain_["updates"], plain_["reward"]) == (7, 100, "jpeg_compressibility")
    assert plain_["agent"]["updates_per_epoch"] == 4
    assert plain_["agent"]["advantage_window"] == 16
    over = imported("ddpo-pytorch", f"{tmp_path / 'dgx.py'}:aesthetic").settings
    assert (over["seed"], over["updates"], over["reward"]) == (7, 200, "aesthetic")
    assert over["agent"]["advantage_window"] == 32


REFUSED = {
    ("trl", "a.yaml", "sample_num_step: 3"): "did you mean 'sample_num_steps'?",
    ("trl", "a.yaml", "num_epochs: 3"): "expected import-config trl-ddpo, or trl-alignprop",
    ("trl", "a.yaml", "{train_cfg: true, log_image_freq: 1}"): "train_cfg is of DDPO and log_image_freq of AlignProp",
    ("trl-ddpo", "a.yaml", "num_epochs: many"): "num_epochs = 'many': expected int",
    ("trl-ddpo", "a.yaml", "num_epochs: true"): "num_epochs = True: expected int",
    ("trl-ddpo", "a.yaml", "train_clip_range: -1"): "clip = -1",
    ("trl-ddpo", "a.yaml", "train_batch_size: 3"): "expected a whole number of steps",
    ("trl-ddpo", "a.yaml", "mixed_precision: fp8"): "expected one of fp16, bf16",
    ("trl-ddpo", "a.yaml", "[1]"): "expected a mapping",
    ("trl-ddpo", "a.yaml", "a: [1"): "cannot be read",
    ("trl-ddpo", "a.toml", ""): "expected a file of settings",
    ("trl-ddpo", "a.sh", "--num_epochs 3 4"): "'4' is no option",
    ("trl-ddpo", "a.sh", "--num_epochs 3 --num_epochs=4"): "there twice",
    ("trl", "a.py", "x = 1"): "no call of DDPOConfig or AlignPropConfig",
    ("trl", "a.py", "DDPOConfig(seed=f())"): "seed= f(): expected a literal",
    ("trl", "a.py", "DDPOConfig(**more)"): "arguments by name",
    ("trl", "a.py", "DDPOConfig(); AlignPropConfig()"): "2 calls",
    ("trl-ddpo", "a.py", "AlignPropConfig()"): "no call of DDPOConfig",
    ("trl-alignprop", "a.py", "AlignPropConfig(truncated_backprop_rand=False, sample_num_steps=9)"): "no step of 9",
    ("ddpo-pytorch", "a.py", "def get_config():\n    config = C()\n    config.seed = 1"): "expected an assignment",
    ("ddpo-pytorch", "a.py", "def other():\n    return 1"): "unknown function",
    ("ddpo-pytorch", "a.yaml", "train: {learning_rat: 1}"): "did you mean 'train.learning_rate'?",
    ("trle", "a.yaml", "seed: 1"): "unknown program 'trle'",
}


@pytest.mark.parametrize(("words", "said"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_refused_in_one_line(tmp_path, capsys, words, said):
    program, name, text = words
    (tmp_path / name).write_text(text)
    assert main(["import-config", program, str(tmp_path / name)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("ending", ["yaml", "py", "sh"])
def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path, ending):
    with pytest.raises(ConfigError, match=rf"^'[^' ]*none.{ending}' is no file$"):
        imported("trl", str(tmp_path / f"none.{ending}"))
    (tmp_path / f"bytes.{ending}").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match=rf"^'[^' ]*bytes.{ending}' is not UTF-8: byte 2$"):
        imported("trl", str(tmp_path / f"bytes.{ending}"))


@pytest.mark.parametrize(("words", "said"), [([], "no program and no file"), (["trl"], "names no file: expected")])
def test_a_program_without_a_file_says_what_is_expected(capsys, words, said):
    assert main(["import-config", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "expected rlfusion import-config PROGRAM FILE" in told


def test_the_page_has_every_setting():
    text = PAGE.read_text()
    for name in ("trl-ddpo", "trl-alignprop", "ddpo-pytorch"):
        assert table_of(name) in text, f"put this into docs/migration.md:\n{table_of(name)}"
    assert set(re.findall(r"`(\w+Config)`", text)) == set(CLASSES)
    assert isinstance(Finetune().track, list)
