"""A reward whose weights were learned is never asked for with random ones: those are a worker's, who is sent others."""

import pytest

from rlfusion import config
from rlfusion.cli import main
from rlfusion.common.errors import ConfigError
from rlfusion.data import load
from rlfusion.evaluation import classifier
from rlfusion.jobs import train_clip
from rlfusion.jobs.check_reward import check_reward
from rlfusion.jobs.measure import Unjudged, make_reward
from rlfusion.rewards.remote.offer import require_servable
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


WRONG = [
    *((name, {"checkpoint": "no-such.pt"}, "without a model") for name in ("clip_score", "clip_class")),
    *((name, {"batch": 0}, "batch = 0") for name in ("clip_score", "clip_class")),
    *((name, {"precision": "float16"}, "precision = ") for name in ("clip_score", "clip_class")),
    *((name, {"resize_mode": "stretch"}, "stretch") for name in ("clip_score", "clip_class")),
    *((name, {"scalee": 2}, "unknown option of reward") for name in FROM_DATA),
    *((name, {"model": "", "checkpoint": "x"}, "without a model") for name in ("clip_score", "clip_class")),
    ("clip_score", {"scale": "2"}, "scale = '2' of reward 'clip_score': expected float"),
    ("clip_score", {"template": "no place for it"}, "template"),
    ("clip_similarity", {}, "needs the options ['reference']: expected {reference: ...} among its options"),
    ("clip_similarity", {"reference": "no-such.png"}, "no-such.png"),
    ("class_logprob", {"shape": [1, 2]}, "shape"),
]


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is trained."""
    for module in (train_clip, classifier):
        monkeypatch.setattr(module, "cached", lambda *about: pytest.fail("trained before it was refused"))


@pytest.mark.parametrize(("name", "given", "said"), WRONG)
def test_what_cannot_be_is_refused_before_anything_is_trained(name, given, said, untrained, tmp_path):
    for reward in (name, {"class_logprob": 1.0, name: 1.0}):
        with pytest.raises(ConfigError) as caught:
            make_reward(reward, {name: given}, load("digits"), tmp_path)
        assert said in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        check_reward(config.CheckReward(name, given, root=str(tmp_path)))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("reward", "options"),
    [
        ({"clip_score": 1.0, "inkk": 1.0}, {}),
        ({"clip_score": 1.0, "jpeg_compressibility": 1.0}, {"jpeg_compressibility": {"quality": 101}}),
        ("clip_score", {"ink": {}}),
        ({"clip_score": 1.0, "aesthetic": 1.0}, {"aesthetic": {"head": "no-such.pth"}}),
    ],
)
def test_what_stands_beside_is_refused_before_anything_is_trained(reward, options, untrained, tmp_path):
    with pytest.raises(ConfigError):
        make_reward(reward, options, load("digits"), tmp_path)


def test_a_held_out_reward_that_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    held = ["--monitor.held_out", "clip_score", "--reward_options", "{clip_score: {checkpoint: x}}"]
    assert main.main(["finetune", "--reward", "ink", *held]) == 2
    assert "checkpoint = 'x' without a model" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
