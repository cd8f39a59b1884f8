"""DRWR, diffusion reward-weighted regression (Ren et al. 2024; Peters & Schaal 2007; handbook 3.3.2, erratum 83).

Samples of the policy are learned again, each with a weight that grows with its reward (``weighted``, Eq. 1 to 4):

    (1)  w = min(exp(beta R), w_max),     R as it is, or z-scored over the rollout or its prompt (DPPO)
    (2)  loss = E w | eps - eps_theta(x_t, t, c) |^2 on fresh noise, in what the network predicts;
         or, along the stored walk, -E sum_t w log p_theta(x_s | x_t, c), perhaps with the mean weight's part of it
         in expectation ("centred", the default: without it the noise of the walks outweighs all but strong rewards)

On samples of p Eq. (2) ends at the tilted density p exp(beta R) / Z, clipped at p min(exp(beta R), w_max) / Z'. After j
rollouts, each of the policy that the last one left, it is p exp(j beta R) / Z: there is no end but the best sample,
unless ``kl`` or ``pretrain_weight`` holds it. A constant taken off R is a factor of all weights, and cancels; under an
active clip it moves the limit, and the fixed point. With z-scores beta counts standard deviations, the tilt of a
rollout is beta R / std, and as the spread falls the next tilt is the sharper.

``memory`` keeps past samples beside those of the rollout: the law that is tilted is then the mixture of the policies
that drew them. What is kept is the walk and its reward; moments and weights are of all that is held, made anew.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative
from rlfusion.common.weights import require_entries
from rlfusion.data import Dataset
from rlfusion.rl import weighted_settings
from rlfusion.rl.advantage import normalized
from rlfusion.rl.agent import Plan
from rlfusion.rl.replay import Replay
from rlfusion.rl.transitions import require_finite
from rlfusion.rl.weighted import Places, Regression
from rlfusion.rollout import RolloutSpec, Task, samples, transitions
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.optimization import Optimization


@dataclass(frozen=True)
class Config(weighted_settings.Settings):
    """Settings of DRWR; ``weighted_settings.Settings`` says the others.

    Attributes:
        name: the algorithm.
        memory: walks that are held, with their rewards, the rollout's own among them; each pass draws as many of them
            as a rollout has. 0 holds none beyond its rollout.
    """

    KEPT: ClassVar[dict[str, str]] = {"memory": "walks"}
    name: Literal["drwr"] = "drwr"
    memory: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "memory")
        if self.memory and self.on == "centred":
            raise ConfigError(
                f"memory = {self.memory}: 'centred' is of the present weights, expected 0 (or on = chain)"
            )

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for fewer walks than updates, or a memory smaller than a rollout."""
        super().check(plan)
        if 0 < self.memory < plan.walks:
            raise ConfigError(f"memory = {self.memory}: expected 0, or at least the {plan.walks} walks of a rollout")

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Samples and rewards, or every transition."""
        return samples(steps) if self.on == "noised" else transitions()

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        return f"{self.told}, out of the last {self.memory} walks" if self.memory else self.told

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError for a chain without noise with ``on`` "chain", or a loss that the model cannot have."""
        return Learner(task, self, data, seed)


class Learner:
    """DRWR. ``update`` takes the samples of a rollout, or its walks."""

    def __init__(self, task: Task, config: Config, data: Dataset, seed: int = 0) -> None:
        self.policy, self.config, self.seed = task.policy, config, seed
        self.regression = Regression(task, config, data, seed)
        self.memory = Replay(config.memory)
        self.iteration = self.queries = 0

    @property
    def optimization(self) -> Optimization:
        return self.regression.optimization

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout.

        Returns:
            reward, reward_std, weight_ess (effective share of what is held), clipped (share of weights at the limit),
            held (walks), loss, grad_norm; also kl and more, where there are such terms.

        Raises:
            NumericalError: a reward, a weight or a gradient is not finite; no update has been made from it.
        """
        require_finite(batch.reward)
        held = self.memory.add(batch)
        advantage = self._advantage(held)
        weight = self.config.weights(advantage)

        def weigh(places: Places) -> Tensor:
            return weight[places.walk]

        metrics = self.regression.fit(held, len(batch), weigh, self.iteration)
        self.iteration += 1
        self.queries += batch.asked
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            **self.config.spread(advantage),
            "held": float(len(held)),
            **metrics,
        }

    def _advantage(self, held: Trajectory) -> Tensor:
        return normalized(held.reward, held.group, self.config.normalize)

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """weight_ess and clipped of the first walks; on the chain also log_ratio_max.

        Raises:
            NumericalError: rollout and learner disagree about the log-probabilities of the chain.
        """
        return self.regression.form.preflight(batch) | self.config.spread(self._advantage(batch))

    def state_dict(self) -> dict:
        state = {"regression": self.regression.state_dict(), "memory": self.memory.state_dict()}
        return state | {"iteration": self.iteration, "queries": self.queries}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the learner")
        self.regression.load_state_dict(state["regression"])
        self.memory.load_state_dict(state["memory"], next(self.policy.parameters()).device)
        self.iteration, self.queries = state["iteration"], state["queries"]
