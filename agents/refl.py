"""ReFL, reward feedback learning (Xu et al. 2023, Alg. 1; handbook 3.3.1, Table 5).

    (1)  a step j is drawn among the late ones of the walk; workers walk to x_j without gradients
    (2)  x0_hat = the denoiser's prediction at (x_j, t_j), x_j a constant; one network call has gradients
    (3)  loss = link(R(x0_hat, c)):  ``Identity``: -r,   ``Relu``: scale relu(goal - r), the paper's phi (in its code,
         THUDM/ImageReward, goal 2 and scale 1e-3),   ``Softplus``: width log(1 + exp((goal - r) / width))
    (4)  plus pretrain_weight times the loss of the base model's own training, on its own data: the regulariser of the
         paper, whose weight is relative to the link's scale

At early steps x0_hat is a blur that no reward was made for, and for an eps network its gradient grows as 1 / alpha (6e3
where alpha_bar = 4e-5): so late steps only, the last quarter by default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.data import Dataset
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.diffusion.rows import of_chain
from rlfusion.pretrain.losses import make
from rlfusion.pretrain.pretraining_term import PretrainingTerm
from rlfusion.rl import reward_gradient
from rlfusion.rl.agent import Plan
from rlfusion.rl.reward_gradient import Learner, Part, Terms, divergence
from rlfusion.rollout import RolloutSpec, Task, prefix


@dataclass(frozen=True)
class Identity:
    """-r."""

    def __call__(self, reward: Tensor) -> Tensor:
        return -reward


@dataclass(frozen=True)
class Relu:
    """scale relu(goal - r): rewards beyond the goal count no more."""

    goal: float = 2.0
    scale: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(self, "scale")

    def __call__(self, reward: Tensor) -> Tensor:
        return self.scale * F.relu(self.goal - reward)


@dataclass(frozen=True)
class Softplus:
    """A smooth relu(goal - r), which bends over ``width`` in units of the reward."""

    goal: float = 2.0
    width: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "width")

    def __call__(self, reward: Tensor) -> Tensor:
        return self.width * F.softplus((self.goal - reward) / self.width)


LINKS: Mapping[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    link.__name__: link for link in (Identity, Relu, Softplus)
}


@dataclass(frozen=True)
class Config(reward_gradient.Settings):
    """Settings of ReFL.

    Attributes:
        name: the algorithm.
        late: share of the steps, from the end, among which j is drawn; at least one step.
        link: Identity(), Relu(goal=..., scale=...) or Softplus(goal=..., width=...): the loss as a function
            of the reward.
        pretrain_weight: weight of the loss of the base model's own training; 0 is none.
        pretrain_loss: that loss, as of pretrain.train.loss.
        pretrain_batch: samples of the base model's data in an update.
        label_dropout: probability that such a sample's label is replaced by "no class".
    """

    name: Literal["refl"] = "refl"
    late: float = 0.25
    link: str = "Identity()"
    pretrain_weight: float = 0.0
    pretrain_loss: str = "Denoising()"
    pretrain_batch: int = 64
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "pretrain_batch")
        require_not_negative(self, "pretrain_weight")
        if not 0 < self.late <= 1:
            raise ConfigError(f"late = {self.late}: expected 0 < late <= 1")
        if not 0 <= self.label_dropout <= 1:
            raise ConfigError(f"label_dropout = {self.label_dropout}: expected a probability in [0, 1]")
        _ = self.linked, make(self.pretrain_loss)  # refuses what no table holds

    @cached_property
    def linked(self) -> Callable[[Tensor], Tensor]:
        """The link that ``link`` writes."""
        return spec.parse(self.link, LINKS, "link")

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for fewer walks than updates, or states of older weights."""
        super().check(plan)
        if plan.lag:
            raise ConfigError(f"lag = {plan.lag}: agent 'refl' goes on from states of the present weights, expected 0")

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """The state before a late step, Eq. (1)."""
        return prefix(steps - max(1, round(self.late * steps)), steps - 1)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        return (
            f"each rollout gives {self.epochs * self.updates_per_epoch} update(s) through one prediction in the last "
            f"{self.late:.0%} of the steps, and asks for {self.epochs} reward(s) a walk"
        )

    def learner(self, task: Task, data: Dataset, seed: int) -> Learner:
        """Raises ConfigError where the reward has no gradient, or the model no such loss."""
        term = PretrainingTerm(self.pretrain_weight, self.pretrain_loss, self.pretrain_batch, self.label_dropout)
        return Learner(task, self, Jumps(task, self), seed, term.of(task.policy.denoiser, data, seed, "refl"))


class Jumps:
    """Eq. (2) and (3)."""

    def __init__(self, task: Task, config: Config) -> None:
        self.task, self.config = task, config
        self.reference = frozen_copy(task.policy) if config.kl_loss else None

    def __call__(self, part: Part) -> Terms:
        t, _ = of_chain(self.task.times, part.begin)
        x0 = self.task.policy.denoiser(part.x, t, part.cond).x0
        reward = self.task.score(x0, part.cond)
        kl = None
        if self.reference is not None:
            jump = Gaussian(x0, torch.zeros((), dtype=x0.dtype, device=x0.device))
            kl = divergence(jump, self.reference.denoiser(part.x, t, part.cond).x0, self.config.kl_std)
        return Terms(reward, self.config.linked(reward), kl)
