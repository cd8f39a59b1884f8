"""What the driver of a group of ranks asks of it."""

from contextlib import nullcontext

import pytest

from rlfusion.cli.ranked import ranked
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Finetune
from rlfusion.config.parts import Learners, Ray
from rlfusion.rollout import ray_cluster, ray_placement, ray_ranks
from rlfusion.rollout.limits import Limits


@pytest.mark.parametrize("start_s", [300.0, 1800.0])
def test_ranks_have_as_long_to_start_as_workers_whose_nodes_may_install_libraries(start_s, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ray_cluster, "shared_cluster", lambda *_: nullcontext())
    monkeypatch.setattr(ray_placement, "together", lambda *_: nullcontext())
    monkeypatch.setattr(ray_ranks, "run_in_group", lambda settings, *_: asked.append(settings))
    settings = Finetune(ray=Ray(limits=Limits(start_s=start_s)), learner=Learners(ranks=2, shares=2))
    ranked("finetune")(settings, tmp_path, Signals(), Progress(True))
    assert [(group.ranks, group.start_s, group.loopback) for group in asked] == [(2, start_s, True)]
