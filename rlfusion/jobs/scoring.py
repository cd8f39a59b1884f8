"""A rollout's rewards as the learner gets them: failed ones left out, several ones each normalised."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from rlfusion.jobs.parts import RewardSpec
from rlfusion.rewards import labels, valid
from rlfusion.rl.advantage import normalized_sum
from rlfusion.rollout.trajectory import Trajectory


def scored(batch: Trajectory, rewards: RewardSpec) -> tuple[Trajectory, dict[str, float]]:
    """The walks whose reward did not fail, with the reward that is learned from, and what to log:

    of every named reward ``reward_NAME``, its mean, and where they are normalised ``share_NAME``, what of the advantage
    is its own; ``reward`` then is still the plain weighted sum. ``failed`` is the share of rewards that failed, and
    ``cached`` the share that was remembered.

    Raises:
        RewardError: more than ``max_failed`` of the rewards failed, or all but one.
    """
    if batch.reward is None:
        return batch, {}
    log: dict[str, float] = {} if batch.cached is None else {"cached": batch.cached.mean().item()}
    if rewards.masked:
        batch, log["failed"] = _without_failed(batch, rewards)
    if batch.terms is None or not isinstance(rewards.reward, Mapping):
        return batch, log
    names = list(labels(list(rewards.reward)).values())
    log |= {f"reward_{name}": mean for name, mean in zip(names, batch.terms.mean(0).tolist())}
    if rewards.normalize == "none":
        return batch, log
    weights = torch.tensor(list(rewards.reward.values()), dtype=batch.terms.dtype, device=batch.terms.device)
    group = batch.group if rewards.normalize == "group" else torch.zeros_like(batch.group)
    total, share = normalized_sum(batch.terms, weights, group)
    log |= {f"share_{name}": part for name, part in zip(names, share.tolist())}
    log["reward"] = batch.reward.mean().item()
    return replace(batch, reward=total), log


def _without_failed(batch: Trajectory, rewards: RewardSpec) -> tuple[Trajectory, float]:
    """The walks whose reward is a number, and the share of the others."""
    fine, failed = valid(batch.reward, rewards.name, rewards.max_failed)
    return (replace(batch.take(fine), failed=int((~fine).sum())) if failed else batch), failed
