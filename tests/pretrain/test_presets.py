"""Every word of ``rlfusion pretrain --objective``: its settings stand, are read back, and resume bit for bit."""

from functools import cache, reduce

import pytest
import torch

from rlfusion import models
from rlfusion.cli.arguments import settings_of
from rlfusion.common.errors import ConfigError
from rlfusion.config import Pretrain, to_yaml
from rlfusion.data import Dataset, digits
from rlfusion.jobs import finetune, pretrain
from rlfusion.pretrain import PRESETS, Learner
from rlfusion.training import checkpoint

SMALL = ("--train.steps", "6", "--train.batch", "8", "--train.warmup", "2")
SMALL = (*SMALL, "--model.net", "ResidualMLP(width=16, depth=1)", "--train.ema", "Power(sigma_rel=0.1)")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_work_and_is_read_back_from_its_file(name, tmp_path):
    config = settings_of("pretrain", ["--objective", name])
    for key, value in PRESETS[name].items():
        assert reduce(getattr, key.split("."), config) == value
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert settings_of("pretrain", ["--config", str(tmp_path / "config.yaml")]) == config
    pretrain.check(config)


def test_what_is_given_beside_a_preset_wins():
    config = settings_of("pretrain", ["--train.lr", "0.02", "--objective", "ct", "--chain.steps", "3"])
    assert (config.train.lr, config.chain.steps) == (0.02, 3)
    assert config.train.loss == PRESETS["ct"]["train.loss"]


def test_guidance_away_from_no_class_needs_a_network_that_learns_it():
    """Consistency presets drop no label."""
    guided = ["--objective", "sct", "--chain.guidance", "1.5"]
    for command, check in (("pretrain", pretrain.check), ("finetune", finetune.check)):
        with pytest.raises(ConfigError, match="label_dropout"):
            check(settings_of(command, [*guided, "--chain.steps", "2"]))
    pretrain.check(settings_of("pretrain", [*guided, "--train.label_dropout", "0.1"]))
    pretrain.check(settings_of("pretrain", [*guided, "--chain.negative", "3"]))


@cache
def data() -> Dataset:
    return digits().split(0.9)[0]


def new(config: Pretrain) -> Learner:
    denoiser = models.build(models.Card(config.model, data().shape, data().names), config.seed)
    return Learner(denoiser, data(), config.train, config.seed)


def bits(state: object) -> object:
    """A state with its tensors as lists."""
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("name", PRESETS)
def test_an_interrupted_training_ends_with_the_same_bits(name, tmp_path):
    config = settings_of("pretrain", ["--objective", name, *SMALL])
    whole, half, resumed = new(config), new(config), new(config)
    said = [whole.update(step) for step in range(6)]
    for step in range(3):
        half.update(step)
    checkpoint.save(tmp_path, 3, half.state_dict())
    resumed.load_state_dict(checkpoint.load(checkpoint.latest(tmp_path).path))
    assert [resumed.update(step) for step in range(3, 6)] == said[3:]
    assert bits(resumed.state_dict()) == bits(whole.state_dict())
    assert ("teacher" in whole.state_dict()) == (name == "ct")
