"""A run of a few updates on a tiny policy, by the product's own collector and learner, on any backend."""

import time
from typing import NamedTuple

import torch
from rollout_tasks import CLASSES, make_policy

from rlfusion.agents import ddpo
from rlfusion.common.weights import Weights, learned, pack, sha256
from rlfusion.config import Rollout
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.policy import Policy
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.parts import Collecting, RewardSpec
from rlfusion.rewards import CallOptions
from rlfusion.rollout import Backend

UPDATES, WALKS = 4, 24
REWARDS = RewardSpec("own", "own", {}, "none", False, 0.0, CallOptions())


class Trained(NamedTuple):
    """The SHA-256 of the final weights, the walks that were learned from, and the seconds from the first update on."""

    digest: str
    walks: list[int]
    seconds: float


def trained(
    backend: Backend,
    progress: list[int] | None = None,
    lag: int = 1,
    updates: int = UPDATES,
    policy: Policy | None = None,
) -> Trained:
    """Learn from ``updates`` rollouts, and note the updates done in ``progress``; ``policy``, where it is made before,
    as that draws from torch's global generator.
    """
    torch.set_num_threads(1)
    policy = policy or make_policy(1)
    learner = ddpo.Learner(policy, TimeGrid(4).times(policy.schedule), ddpo.Config(epochs=1, updates_per_epoch=2))
    spec = Collecting(3, Rollout(CLASSES, WALKS // CLASSES, 4, lag=lag), updates, 100)
    collector = Collector(backend, spec, REWARDS, CLASSES, 0, torch.device("cpu"))
    collector.publish(Weights.of(policy, 0))
    began, walks = 0.0, []
    for step in range(updates):
        batch = collector.batch(step)
        walks.append(len(batch))
        learner.update(batch)
        began = began or time.monotonic()
        if progress is not None:
            progress.append(step)
        collector.publish(Weights.of(policy, step + 1))
    return Trained(sha256(pack(learned(policy))), walks, time.monotonic() - began)
