"""The part of a policy gradient that a last step without noise carries through its mean."""

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import moved
from rlfusion.rollout import Task
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.ranks import current


class PathwiseStep:
    """The part of grad J that a noise-free last step carries: grad_theta R(decode(mean_theta(x_t, c)), c)."""

    def __init__(self, task: Task) -> None:
        """
        Raises:
            ConfigError: the last step has noise, or the reward has no gradient.
        """
        self.task = task
        if bool(task.policy.stds(task.times)[-1] > 0):
            raise ConfigError(
                f"last_step = pathwise: the last step of {task.policy.kernel} has noise, expected exclude"
            )
        task.require_differentiable_reward()

    def accumulate(self, batch: Trajectory, walks: Tensor, scale: Tensor, micro_batch: int) -> None:
        """Add the descent gradient, the mean over ``walks`` of -scale R: scale (B,) is that of the advantages."""

        def part(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            walk = walks[rows]
            obs, _ = batch.transitions(walk, torch.full_like(walk, batch.steps - 1))
            reward = self.task.score(self.task.policy(obs).mean, obs.cond)
            return -(scale[moved(walk, scale.device)] * reward).sum() / len(walks), {}

        ranks = current()
        ranks.accumulate(self.task.policy, ranks.share(walks, len(batch)), micro_batch, part)
