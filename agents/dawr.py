"""DAWR, diffusion advantage-weighted regression (Ren et al. 2024; Peng et al. 2019; handbook 3.3.2, erratum 84).

As DRWR, with an advantage in the place of the reward (``weighted``, Eq. 1 to 4):

    (1)  w = min(exp(beta A), w_max),     A z-scored over the rollout or its prompt (DPPO), or as it is
    (2)  advantage = "gae":     along the walk A_k = sum_l (gamma lam)^l d_{k+l} of each step, by a learned V(x_t, t, c)
                                (``chain_value``); on noised samples, which have no next state, A = R - V(x_t, t, c)
         advantage = "critic":  A = R - V(x_T, T, c), of the whole walk, by V at pure noise
         advantage = "prompt", "batch":  A = R - the mean of its prompt, or of the rollout; nothing is learned

V is fitted to a rollout after the policy, so the advantages use the V from before that rollout. A baseline of
(x_t, t, c) alone is a common factor of all weights at that state. Without clip and z-score it therefore keeps the fixed
points of DRWR, p exp(beta R) / Z, and the weights spread less. With lam < 1 the weight of a step is what that step
changed itself, as V sees it, and the tilt is that of each step and not of the walk. Entropy has no gradient, because
the kernel sets the std of the steps.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import require_entries
from rlfusion.data import Dataset
from rlfusion.rl import chain_value, weighted_settings
from rlfusion.rl.advantage import group_moments, normalized
from rlfusion.rl.agent import Plan, Traits
from rlfusion.rl.chain_value import ChainValue
from rlfusion.rl.transitions import require_finite
from rlfusion.rl.weighted import Places, Regression, Weigh
from rlfusion.rollout import RolloutSpec, Task, samples, transitions
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.optimization import Optimization


@dataclass(frozen=True)
class Config(weighted_settings.Settings, chain_value.Settings):
    """Settings of DAWR; ``weighted_settings.Settings`` and ``chain_value.Settings`` say the others.

    Attributes:
        name: the algorithm.
        advantage: Eq. (2): "gae", "critic", "prompt" or "batch".
    """

    KEPT: ClassVar[dict[str, str]] = {"critic": "critic"}
    name: Literal["dawr"] = "dawr"
    advantage: Literal["gae", "critic", "prompt", "batch"] = "gae"

    def __post_init__(self) -> None:
        weighted_settings.Settings.__post_init__(self)
        chain_value.Settings.__post_init__(self)
        if self.on == "noised" and self.advantage == "gae" and self.gamma < 1:
            raise ConfigError(f"gamma = {self.gamma}: a noised sample is no step of a walk, expected 1 (or on = chain)")

    @property
    def learns_value(self) -> bool:
        """Whether advantages come from a value function that is learned."""
        return self.advantage in ("gae", "critic")

    def traits(self) -> Traits:
        """Perhaps a value function; the steps of walks on noised samples are its alone."""
        return replace(super().traits(), critic=self.value_net if self.learns_value else "")

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for fewer walks than updates, or nothing to compare in a prompt."""
        super().check(plan)
        if self.advantage == "prompt":
            plan.require_groups()

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Every transition; samples and rewards alone where nothing looks at the steps."""
        return transitions() if self.on != "noised" or self.learns_value else samples(steps)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        fit = f"; V is fitted in {self.value_epochs} pass(es) over its states" if self.learns_value else ""
        return self.told + fit

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError for a chain without noise with ``on`` "chain", or a loss or network that cannot be."""
        return Learner(task, self, data, seed)


class Learner:
    """DAWR. ``update`` takes the walks of a rollout, or its samples where that is all it needs."""

    def __init__(self, task: Task, config: Config, data: Dataset, seed: int = 0) -> None:
        self.policy, self.config, self.seed = task.policy, config, seed
        self.regression = Regression(task, config, data, seed)
        self.critic = ChainValue(task, config, seed) if config.learns_value else None
        self.iteration = self.queries = 0

    @property
    def optimization(self) -> Optimization:
        return self.regression.optimization

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout, of the policy and then of V.

        Returns:
            reward, reward_std, weight_ess (effective share of walks or steps), clipped (share of weights at the limit),
            loss, grad_norm; with V also value_loss and explained_variance (before the fit); also kl and more, where
            there are such terms.

        Raises:
            NumericalError: a reward, a weight or a gradient is not finite; the update that it belongs to has not been
                made.
        """
        require_finite(batch.reward)
        value = self._values(batch)
        advantage = self._advantage(batch, value)
        metrics = self.regression.fit(batch, len(batch), self._weigh(batch, advantage), self.iteration)
        if self.critic:
            returns = self.critic.advantages(batch.reward, value) + value
            metrics |= {"explained_variance": self.critic.explained(batch.reward, value)}
            metrics |= self.critic.fit(batch, returns, self.iteration)
        self.iteration += 1
        self.queries += batch.asked
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            **self.config.spread(self._normalized(batch, advantage)),
            **metrics,
        }

    def _values(self, batch: Trajectory) -> Tensor | None:
        """V of the states before each step, (B, K)."""
        if self.critic is None:
            return None
        self.critic.see(batch.reward)
        return self.critic.along(batch)

    def _advantage(self, batch: Trajectory, value: Tensor | None) -> Tensor:
        """Eq. (2) of each stochastic step of a walk, (B, k); of whole walks, (B, 1)."""
        rule, reward = self.config.advantage, batch.reward
        if rule == "critic":
            return (reward - value[:, 0])[:, None]
        if rule != "gae":
            of = batch.group if rule == "prompt" else torch.zeros_like(batch.group)
            return (reward - group_moments(reward, of)[0].to(reward))[:, None]
        if self.config.on == "noised":
            return reward[:, None] - value
        return self.critic.advantages(reward, value)[:, self.regression.form.transitions.steps.to(value.device)]

    def _normalized(self, batch: Trajectory, advantage: Tensor) -> Tensor:
        group = batch.group[:, None].expand_as(advantage)
        return normalized(advantage.flatten(), group.flatten(), self.config.normalize).reshape(advantage.shape)

    def _weigh(self, batch: Trajectory, advantage: Tensor) -> Weigh:
        """The weight of each step of a walk, of whole walks, or by V of each noised state."""
        if self.config.on == "noised" and self.config.advantage == "gae":
            return lambda places: self._weights_at(batch, places)
        weight = self.config.weights(self._normalized(batch, advantage))
        if weight.shape[1] == 1:
            return lambda places: weight[places.walk, 0]
        place = torch.zeros(batch.steps, dtype=torch.int64, device=weight.device)
        steps = self.regression.form.transitions.steps.to(weight.device)
        place[steps] = torch.arange(len(steps), device=weight.device)
        return lambda places: weight[places.walk, place[places.step]]

    def _weights_at(self, batch: Trajectory, places: Places) -> Tensor:
        group = batch.group[places.walk]
        advantage = batch.reward[places.walk] - self.critic.at(places.x(), places.t, group).to(batch.reward)
        return self.config.weights(normalized(advantage, group, self.config.normalize))

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """On the chain log_ratio_max.

        Raises:
            NumericalError: rollout and learner disagree about the log-probabilities of the chain.
        """
        return self.regression.form.preflight(batch)

    def state_dict(self) -> dict:
        state = {"regression": self.regression.state_dict(), "iteration": self.iteration, "queries": self.queries}
        return state if self.critic is None else state | {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the learner")
        self.regression.load_state_dict(state["regression"])
        self.iteration, self.queries = state["iteration"], state["queries"]
        if self.critic:
            self.critic.load_state_dict(state["critic"])
