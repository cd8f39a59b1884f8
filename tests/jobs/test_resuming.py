"""--resume and --change of every command, agent and method: the settings come back, and one change is one change."""

from dataclasses import replace
from functools import partial

import pytest
import yaml

from rlfusion.agents import AGENTS
from rlfusion.cli.arguments import settings_of
from rlfusion.config import to_yaml
from rlfusion.distill import METHODS
from rlfusion.jobs import resuming
from rlfusion.training import deciding, identity

REWARDS = """
def bright(samples, cond, strength=1.0):
    return samples.flatten(1).mean(1)
"""
REWARD = ("--reward", "{mine.py:bright: 1, ink: 2}")
OWN = {"mine.py:bright": {"strength": 0.5, "adapter": {"parameters": {"samples": "images"}}}, "ink": {}}

ARGUMENTS = {
    **{f"finetune {name}": ("finetune", ["--agent", name], "updates", "seed") for name in AGENTS},
    **{f"distill {name}": ("distill", ["--method", name], "checkpoint_every", "seed") for name in METHODS},
    "compare": ("compare", ["--agents", "ddpo,grpo(window=5)"], "budget_queries", "evaluations"),
    "pretrain": ("pretrain", [], "checkpoint_every", "train.steps"),
    "pretrain-autoencoder": ("pretrain-autoencoder", [], "checkpoint_every", "steps"),
    "train-clip": ("train-clip", [], "checkpoint_every", "steps"),
    "own rewards": (
        "finetune",
        ["--reward", "{mine.py:bright: 1, ink: 2}", "--reward_options", str(OWN)],
        "updates",
        "seed",
    ),
}


@pytest.fixture(params=ARGUMENTS)
def begun(request, tmp_path, monkeypatch):
    """The command, its settings, a free and a decisive one of these, and the folder of a run that has begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    command, words, free, decisive = ARGUMENTS[request.param]
    settings = replace(settings_of(command, words), name="it")
    folder = tmp_path / "runs" / "it"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(settings))
    identity.enter(folder, command, settings)
    return command, settings, free, decisive, folder


def go_on(command: str, folder, **changes: str):
    return resuming.settings_of_run(command, folder, changes, partial(settings_of, command))


def test_settings_come_back_and_a_change_is_that_change_alone(begun):
    """The second change would come with others where what the first one wrote did not come back."""
    command, settings, free, decisive, folder = begun
    before = deciding.flat(go_on(command, folder))
    assert before == deciding.flat(settings)
    for name in (free, decisive):
        after = deciding.flat(go_on(command, folder, **{name: "77"}))
        assert deciding.differences(before, after) == {name: (before[name], 77)}
        assert identity.Record.read(folder).settings == after
        before = after


def test_a_lost_file_of_settings_is_written_again_as_it_was(begun):
    command, _, _, _, folder = begun
    held = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").unlink()
    go_on(command, folder)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == held
