"""A model's card says which data it was pretrained on: what begins with it takes them from there, as they were."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlfusion import models
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config import Distill, Evaluate
from rlfusion.data import load
from rlfusion.data.sources import absolute, missing
from rlfusion.jobs import pretrain
from rlfusion.jobs.measure import require_models_data

WORDS = ("--train.steps", "20", "--train.batch", "32", "--model.net", "ResidualMLP(width=32, depth=1)")


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """A folder with ``runs/own``, pretrained on its ``own.npz``: bright and dark images of 8x8 in two classes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    label = np.arange(240) % 2
    images = (rng.integers(0, 100, (240, 8, 8)) + 120 * label[:, None, None]).astype(np.uint8)
    np.savez("own.npz", images=images, labels=label)
    words = ["pretrain", "--data", "own.npz", "--held_out", "0.4", "--name", "own", "--evaluation.samples", "60"]
    assert main([*words, *WORDS, "--quiet"]) == 0
    return tmp_path


def told(settings) -> tuple:
    return settings.data, settings.size, settings.held_out


def test_what_begins_with_it_takes_its_data(trained, monkeypatch, capsys):
    place = str(trained / "own.npz")
    held = models.load_card(Path("runs/own")).data
    assert held == {"data": place, "size": 32, "held_out": 0.4, "sha256": load("own.npz").sha256}
    own = (place, 32, 0.4)
    (trained / "elsewhere").mkdir()
    monkeypatch.chdir(trained / "elsewhere")
    base = str(trained / "runs" / "own")
    for command in ("finetune", "compare"):
        assert told(settings_of(command, ["--base", base]).pretrain) == own
    assert isinstance(made := settings_of("distill", ["--teacher", base]), Distill)
    assert told(made.pretrain) == own
    # what is told counts, and so does a base that says nothing
    assert told(settings_of("finetune", ["--base", base, "--pretrain.held_out", "0.2"]).pretrain) == (place, 32, 0.2)
    assert told(settings_of("finetune", ["--base", base, "--pretrain.data", "digits"]).pretrain) == ("digits", 32, 0.25)
    assert told(settings_of("finetune", []).pretrain) == ("digits", 32, 0.25)
    words = ["finetune", "--base", base, "--agent", "ddpo", "--reward", "ink", "--updates", "1", "--quiet"]
    words += ["--evaluation.samples", "60", "--monitor.every", "0", "--rollout.samples_per_prompt", "4"]
    assert main([*words, "--chain.steps", "4", "--name", "tuned"]) == 0, capsys.readouterr().err
    assert models.load_card(Path("runs/tuned")).data == held, "a model that was tuned says it, too"
    assert main(["evaluate", "--checkpoint", base, "--evaluation.samples", "60"]) == 0
    assert "frechet" in capsys.readouterr().out


def test_data_that_are_gone_or_changed_are_refused_in_one_line(trained, capsys):
    Path("own.npz").rename("moved.npz")
    words = ["finetune", "--base", "runs/own", "--reward", "ink"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "base = 'runs/own' was pretrained on" in said
    assert "which is not there any more: expected --pretrain.data of where it is now" in said
    assert main(["sample", "--checkpoint", "runs/own", "--count", "2"]) == 0, "it needs none"
    held = dict(np.load("moved.npz"))
    held["images"][0] = 7
    np.savez("own.npz", **held)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "was pretrained on" in said
    assert "has changed since" in said
    card = models.load_card(Path("runs/own"))
    with pytest.raises(ConfigError, match="has changed since"):
        require_models_data("own.npz", load("own.npz"), card)
    require_models_data("moved.npz", load("moved.npz"), card)
    assert main([*words, "--pretrain.data", "moved.npz", "--pretrain.size", "32", "--updates", "nothing"]) == 2
    assert "updates" in capsys.readouterr().err, "its own data by another name are taken"


def test_more_held_out_than_the_model_left_out_is_refused(trained, capsys):
    for words in (
        ["evaluate", "--checkpoint", "runs/own", "--held_out", "0.5", "--evaluation.samples", "60"],
        ["finetune", "--base", "runs/own", "--reward", "ink", "--pretrain.held_out", "0.5"],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"held_out = 0.5: .* was pretrained on all but 0.4 of the same data", said)
    card, data = models.load_card(Path("runs/own")), load("own.npz")
    require_models_data("own.npz", data, card, 0.25)
    apart = replace(data, held=torch.arange(len(data)) < 9)  # says itself what is held out
    require_models_data("elsewhere.npz", apart, card, 0.5)


def test_its_own_data_told_by_another_path_are_read_and_split_as_they_were(trained):
    base = ["finetune", "--base", "runs/own", "--pretrain.data"]
    assert told(settings_of("finetune", [*base[1:], "own.npz"]).pretrain)[1:] == (32, 0.4)
    assert told(settings_of("finetune", [*base[1:], "./own.npz"]).pretrain)[1:] == (32, 0.4)
    assert told(settings_of("finetune", [*base[1:], "digits"]).pretrain)[1:] == (32, 0.25)


def test_what_it_held_out_is_not_learned_by_the_path_as_it_was_typed(trained, capsys, caplog):
    words = ["finetune", "--base", "runs/own", "--agent", "sft", "--agent.data", "own.npz", "--reward", "ink"]
    words += ["--updates", "1", "--monitor.every", "0", "--evaluation.samples", "60", "--chain.steps", "4"]
    assert main([*words, "--name", "taught"]) == 0, capsys.readouterr().err
    assert len(load("own.npz").split(0.4)[0]) == 144
    assert "agent.data 'own.npz': 144 samples" in caplog.messages


def test_data_of_another_shape_are_said_to_be_so(trained):
    card = models.load_card(Path("runs/own"))
    other = load("own.npz")
    with pytest.raises(ConfigError, match=r"its samples are \(1, 4, 4\)"):
        require_models_data("own.npz", replace(other, x=other.x[..., :4, :4]), card)


def test_a_card_of_an_earlier_version_says_nothing(tiny_root):
    file = next((tiny_root / "cache").glob("base-*/model/model.json"))
    held = json.loads(file.read_text())
    assert held["data"]["data"] == "digits"
    card = models.Card.from_json({name: value for name, value in held.items() if name != "data"})
    assert card.data == {}
    pretrain.require_same_data("base", card, models.Card.from_json(held), "digits")


def test_paths_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pets").mkdir()
    Path("own.py").touch()
    assert absolute("digits") == "digits"
    assert absolute("pets") == str(tmp_path / "pets")
    assert absolute("folder(path='pets', split='a')") == f"folder(path={str(tmp_path / 'pets')!r}, split='a')"
    assert absolute("hf(path='me/data')") == "hf(path='me/data')"
    assert absolute("own.py:made(path='pets')") == f"{tmp_path / 'own.py'}:made(path={str(tmp_path / 'pets')!r})"
    for named in ("digits", "me/data", "hf(path='me/data')", absolute("pets"), absolute("own.py:made(path='pets')")):
        assert missing(named) == ""
    assert missing("/gone/a.npz") == missing("npz(path='/gone/a.npz')") == "/gone/a.npz"
    assert missing("/gone/pets (1)") == "/gone/pets (1)"
    assert Evaluate(checkpoint="x").data == "digits"
