"""An algorithm of your own in one file: REINFORCE whose baseline is the mean of a prompt's other walks.

rlfusion check-agent examples/own_agent.py:LeaveOneOut
rlfusion finetune --agent examples/own_agent.py:LeaveOneOut

(1)  A_i = R_i - mean of R_j, j the other walks of the prompt = (R_i - mean) n / (n - 1)
(2)  gradient of E R = E sum_t A_i grad log p(x_s | x_t)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlfusion.common.weights import require_entries
from rlfusion.rl.advantage import group_moments
from rlfusion.rl.agent import Plan
from rlfusion.rl.transitions import Terms, Transitions, require_finite
from rlfusion.rollout import RolloutSpec, Task, transitions
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.optimization import Optimization


@dataclass(frozen=True)
class LeaveOneOut:
    """REINFORCE with a leave-one-out baseline: one optimiser step on the walks of each rollout."""

    lr: float = 1e-3
    micro_batch: int = 2048

    def check(self, plan: Plan) -> None:
        """Refuse one walk a prompt: there would be no other."""
        plan.require_groups()

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Workers keep every transition with its log-probability."""
        return transitions()

    def learner(self, task: Task, data: object, seed: int) -> "Learner":
        """The learner of the task's policy."""
        return Learner(task, self, seed)


class Learner:
    """Takes the trajectory of each rollout, and steps on Eq. (2)."""

    def __init__(self, task: Task, config: LeaveOneOut, seed: int) -> None:
        self.policy, self.seed = task.policy, seed
        self.transitions = Transitions(task.policy, task.times, config.micro_batch, reference=False)
        self.optimization = Optimization(task.policy, config.lr, weight_decay=0.0, max_grad_norm=1.0, ema=0.9)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        require_finite(batch.reward)
        advantage, steps = self.advantage(batch.reward, batch.group), self.transitions.steps
        walk = torch.arange(len(batch)).repeat_interleave(len(steps))

        def objective(terms: Terms) -> Tensor:
            return -advantage[terms.walk] * terms.log_ratio.exp()  # at ratio 1: the gradient of log p

        self.transitions.accumulate(batch, walk, steps.repeat(len(batch)), objective, None, 0.0, len(steps))
        norm = self.optimization.step()
        self.iteration += 1
        self.queries += batch.asked
        return {"reward": batch.reward.mean().item(), "grad_norm": norm}

    def advantage(self, reward: Tensor, group: Tensor) -> Tensor:
        """Eq. (1), (B,); 0 for a walk that is alone."""
        mean, _ = group_moments(reward, group)
        count = (group[:, None] == group).sum(1)
        return ((reward - mean) * count / (count - 1).clamp(min=1)).to(reward)

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """The ratio must be 1 at the weights that walked."""
        return self.transitions.require_on_policy(batch, 0.2)

    def state_dict(self) -> dict:
        return {"optimization": self.optimization.state_dict(), "iteration": self.iteration, "queries": self.queries}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the learner")
        self.optimization.load_state_dict(state["optimization"])
        self.iteration, self.queries = state["iteration"], state["queries"]
