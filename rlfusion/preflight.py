"""Checks of a fine-tuning job on a small batch, before any training: what would fail quietly is refused loudly.

(1)  at the acting weights the importance ratio is 1:  max |log p_theta - log p_old| < clip / 10
(2)  no two walks begin with the same noise
(3)  every reward is finite (a reward that is not is refused where it is scored)
(4)  some step of the chain has noise (refused when the learner is built)
"""

import torch

from rlfusion.agents import ddpo
from rlfusion.errors import ConfigError, NumericalError
from rlfusion.trajectory import Trajectory


def preflight(learner: ddpo.Learner, batch: Trajectory) -> dict[str, float]:
    """Run the checks on a trajectory of the learner's present weights.

    Returns:
        log_ratio_max of (1), in nats; reward and reward_std of the batch.

    Raises:
        NumericalError: (1) fails: rollout and learner disagree about the policy.
        ConfigError: (2) fails.
    """
    gap = max_log_ratio(learner, batch)
    allowed = learner.config.clip / 10
    if not gap < allowed:
        raise NumericalError(
            f"the importance ratio is not 1 before the first update: max |log ratio| = {gap:.3g}, expected below a "
            f"tenth of the clip range, {allowed:.3g}. Rollout and learner must run one network in one precision and "
            "guidance (no dropout or batch norm in training mode); or the smallest noise of the chain is too small"
        )
    starts = batch.x[:, 0].flatten(1)
    if len(starts.unique(dim=0)) != len(starts):
        raise ConfigError("two walks of one rollout begin with the same noise: their seeds are not distinct")
    spread = batch.reward.std(correction=0).item()
    return {"log_ratio_max": gap, "reward": batch.reward.mean().item(), "reward_std": spread}


@torch.no_grad()
def max_log_ratio(learner: ddpo.Learner, batch: Trajectory) -> float:
    """max |log p_theta - log p_old| over all stochastic steps, on the scale that the clip sees."""
    walk = torch.arange(len(batch)).repeat_interleave(len(learner.trainable))
    gap = learner.log_ratio(batch, walk, learner.trainable.repeat(len(batch))).abs().max().item()
    return gap / batch.x[0, 0].numel() if learner.config.clip_per_dim else gap
