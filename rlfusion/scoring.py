"""A rollout's rewards as the learner gets them: failed ones left out, several ones each normalised."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from rlfusion.advantage import normalized_sum
from rlfusion.config import Finetune
from rlfusion.rewards import RewardError
from rlfusion.trajectory import Trajectory

FEWEST = 2


def scored(batch: Trajectory, config: Finetune) -> tuple[Trajectory, dict[str, float]]:
    """The walks whose reward did not fail, with the reward that is learned from, and what to log:

    of every named reward ``reward_NAME``, its mean, and where they are normalised ``share_NAME``, what of the advantage
    is its own; ``reward`` then is still the plain weighted sum. ``failed`` is the share of rewards that failed.

    Raises:
        RewardError: more than ``max_failed`` of the rewards failed, or all but one.
    """
    if batch.reward is None:
        return batch, {}
    log: dict[str, float] = {}
    if config.reward_failures == "mask":
        batch, log["failed"] = _without_failed(batch, config)
    if batch.terms is None or not isinstance(config.reward, Mapping):
        return batch, log
    names = [name.rpartition(":")[2] for name in config.reward]
    log |= {f"reward_{name}": mean for name, mean in zip(names, batch.terms.mean(0).tolist())}
    if config.reward_normalize == "none":
        return batch, log
    weights = torch.tensor(list(config.reward.values()), dtype=batch.terms.dtype, device=batch.terms.device)
    group = batch.group if config.reward_normalize == "group" else torch.zeros_like(batch.group)
    total, share = normalized_sum(batch.terms, weights, group)
    log |= {f"share_{name}": part for name, part in zip(names, share.tolist())}
    log["reward"] = batch.reward.mean().item()
    return replace(batch, reward=total), log


def _without_failed(batch: Trajectory, config: Finetune) -> tuple[Trajectory, float]:
    """The walks whose reward is a number, and the share of the others."""
    fine = ~batch.reward.isnan()
    failed = 1 - fine.double().mean().item()
    if failed > config.max_failed or int(fine.sum()) < FEWEST:
        raise RewardError(
            f"reward {config.reward_name!r} failed for {failed:.0%} of {len(batch)} samples: "
            f"expected at most max_failed = {config.max_failed:g}"
        )
    return (batch.take(fine) if failed else batch), failed
