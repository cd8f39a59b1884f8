"""A reward whose weights were learned is never asked for with random ones: those are a worker's, who is sent others."""

import pytest

from rlfusion.cli import main
from rlfusion.common.errors import ConfigError
from rlfusion.data import load
from rlfusion.jobs.measure import Unjudged, make_reward
from rlfusion.rewards.remote.server import require_servable
from rlfusion.rewards.untrained import FROM_DATA, require_weights

ARCHITECTURE = {"model": {}, "preprocess": {}}
CLIPS = ["aesthetic", "clip_class", "clip_score", "clip_similarity", "hps_v2", "pick_score"]
BLANK = [
    *((name, {"architecture": ARCHITECTURE, "model": "x"}) for name in CLIPS),
    *((name, {"model": model}) for name in ("aesthetic", "hps_v2", "pick_score") for model in (None, "")),
    ("aesthetic", {"head": [768, 1]}),
]
ENTRIES = {
    "evaluate and check-reward of a pipeline": lambda name, o, root: Unjudged((1, 8, 8), ("a",)).reward(name, o, root),
    "all with data": lambda name, o, root: make_reward(name, o, load("digits"), root),
    "serve-reward": lambda name, o, root: require_servable(name, o[name]),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("name", "given"), BLANK)
def test_options_that_leave_a_reward_without_weights_are_refused(name, given, entry, tmp_path):
    with pytest.raises(
        ConfigError, match=rf"option \w+ = .* of reward '{name}' leaves it without trained weights: exp"
    ):
        ENTRIES[entry](name, {name: given}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_finetune_says_so_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--reward", "hps_v2", "--reward_options", "{hps_v2: {model: null}}"]
    assert main.main(["finetune", *settings]) == 2
    told = capsys.readouterr().err
    assert told.startswith("rlfusion: option model = None of reward 'hps_v2' leaves it without trained weights: ")
    assert told.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_leaves_the_weights_alone_is_taken():
    require_weights({name: {"batch": 8, "architecture": None} for name in CLIPS})
    require_weights({name: {key: None} for name, (key, _) in FROM_DATA.items()} | {"hps_v2": None})
    require_weights({"mine.py:own": {"model": None, "architecture": {"width": 8}, "head": [1]}})
