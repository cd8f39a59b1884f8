"""Checks of a fine-tuning job on a small batch, before any training: what would fail quietly is refused loudly.

(1)  no two walks begin with the same noise
(2)  every reward is finite (a reward that is not is refused where it is scored)
(3)  the learner's own: the importance ratio is 1 at the acting weights, or the reward has a gradient
"""

from rlfusion.common.errors import ConfigError
from rlfusion.models.lora_dropout import dropped
from rlfusion.rl.agent import AgentLearner
from rlfusion.rl.reward_gradient import PREFLIGHT
from rlfusion.rollout.trajectory import Trajectory


def preflight(learner: AgentLearner, batch: Trajectory) -> dict[str, float]:
    """Run the checks on a trajectory of the learner's present weights.

    Returns:
        What the learner found; reward and reward_std of the batch, where it was scored.

    Raises:
        NumericalError, ConfigError: a check fails.
    """
    with dropped(learner.policy, learner.seed, PREFLIGHT):
        found = learner.preflight(batch)
    starts = batch.x[:, 0].flatten(1)
    if len(starts.unique(dim=0)) != len(starts):
        raise ConfigError("two walks of one rollout begin with the same noise: their seeds are not distinct")
    if batch.reward is None:
        return found
    spread = batch.reward.std(correction=0).item()
    return found | {"reward": batch.reward.mean().item(), "reward_std": spread}
