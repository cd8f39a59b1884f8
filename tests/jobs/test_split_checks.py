"""The driver of a job whose networks will be split holds no weights of them as it looks whether the job can work."""

from pathlib import Path

import pytest
from anonymous import STATUS, give_back, peak

from rlfusion import models
from rlfusion.agents import NAMES
from rlfusion.cli.arguments import settings_of
from rlfusion.common import shards
from rlfusion.config import Pretrain
from rlfusion.data import load
from rlfusion.jobs import distill, pretrain
from rlfusion.jobs.finetune import checks
from rlfusion.models import Config

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not shards.can_split(), reason="needs an FSDP2 that takes sums of ours"),
    pytest.mark.skipif(not STATUS.is_file(), reason="reads /proc"),
]
NET = "ResidualMLP(width=1024, depth=5)"
SPLIT = ("--learner.ranks", "2", "--learner.shares", "2", "--learner.shard", "fsdp", "--device", "cpu")
LOOKS = ("--evaluation.samples", "60")
CHECKS = {"pretrain": pretrain.check, "distill": distill.check, "finetune": checks.check}
ON = ("finetune", "--base", "base", "--reward", "ink")
GIVEN = {
    "pretrain": ("pretrain", "--model.net", NET),
    "distill": ("distill", "--teacher", "base"),
    "distill, of its own teacher": ("distill", "--pretrain.model.net", NET),
    "finetune, of its own base": ("finetune", "--pretrain.model.net", NET),
    **{agent: (*ON, "--agent", agent) for agent in NAMES if agent != "sft"},  # which learns from images alone
    "opd": (*ON, "--agent", "opd", "--agent.teacher", "base"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    about = Pretrain(model=Config(net=NET))
    card = pretrain.card_of(about, load(about.data, about.size))
    models.save(folder / "base", models.build(card), card)
    models.load_hollow(folder / "base")  # torch imports much as it first meets the meta device
    return folder


def test_the_driver_has_no_weights_of_what_will_be_split(base, monkeypatch):
    monkeypatch.chdir(base)
    whole = (base / "base" / "weights.safetensors").stat().st_size
    give_back()
    found: dict[str, int] = {}
    for name, (command, *more) in GIVEN.items():
        settings = settings_of(command, [*SPLIT, *LOOKS, *more])
        with peak(found, name):
            CHECKS[command](settings)
    assert max(found.values()) < whole / 5, found
