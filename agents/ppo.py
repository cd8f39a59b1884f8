"""PPO of a denoising chain with a learned value at every step (Schulman et al. 2017; DPPO: Ren et al. 2024).

    (1)  A_k = sum_l (gamma lam)^l d_{k+l},  d_k = R [k = K-1] + gamma V(x_{k+1}) - V(x_k): of each step of a walk, by V
         from before the rollout (``chain_value``; ``advantage``, Eq. 4), normalised over all trained steps
    (2)  loss = -sum_k min(r_k A_k, clip(r_k, 1 - clip, 1 + clip) A_k) + kl_loss KL(p_theta || p_ref),   r = p / p_old

``ddpo`` and ``grpo`` give all steps of a walk the walk's advantage. Here a step has what it changed itself, as V sees
it: the noise of the steps after it does not count for it. With gamma = lam = 1 the expected gradient is theirs for any
V, a baseline of the state; lam < 1 trusts V, for a bias. gamma < 1 is DPPO's discount of the noisier steps, a bias as
well. Its episode of many actions is one sample here, and its V, of the observation alone, is one of (x_t, t, prompt).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.data import Dataset
from rlfusion.objectives import clipped_surrogate
from rlfusion.rl import chain_value
from rlfusion.rl.advantage import normalized
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.rl.chain_value import ChainValue
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rl.pace import Pace, of_pipelines, require_followed, require_pace, said
from rlfusion.rl.transitions import Terms, Transitions, Weighing, largest_log_ratio, require_finite
from rlfusion.rollout import RolloutSpec, Task, transitions
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import current


@dataclass(frozen=True)
class Config(chain_value.Settings, Defaults):
    """Settings of PPO; ``chain_value.Settings`` says those of V.

    Attributes:
        name: the algorithm.
        lr: learning rate.
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the walks.
        clip: of Eq. (2).
        dual_clip: limit of the ratio where the advantage is negative; None is none.
        clip_per_dim: divide the log-ratio by the number of features before the clip.
        step_weight: weights of the steps in the loss, "none" or "noise", as of DDPO.
        normalize: of Eq. (1): mean 0 and std 1 over all trained steps ("batch"), or as they are ("none").
        advantage_clip: advantages are limited to +- this.
        kl_loss: coefficient of the KL to the base model, in advantage units a nat.
        micro_batch: transitions in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets; of V as well.
        warmup: optimiser steps over which the learning rate rises from 0.
        pace: shift of a transition's mean that the updates of a rollout are to bring, as of DDPO; None keeps to lr.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    KEPT: ClassVar[dict[str, str]] = {"critic": "critic", "pace": "pace"}
    name: Literal["ppo"] = "ppo"
    lr: float = 1e-3
    epochs: int = 2
    updates_per_epoch: int = 4
    clip: float = 0.2
    dual_clip: float | None = 3.0
    clip_per_dim: bool = False
    step_weight: Weighing = "none"
    normalize: Literal["batch", "none"] = "batch"
    advantage_clip: float = 5.0
    kl_loss: float = 0.05
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    warmup: int = 0
    pace: float | None = None
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lr", "epochs", "updates_per_epoch", "clip", "advantage_clip", "micro_batch")
        require_positive(self, "max_grad_norm")
        require_not_negative(self, "kl_loss", "weight_decay", "warmup")
        require_pace(self.pace)
        optimizers.settle(self)
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip:
            raise ConfigError(f"dual_clip = {self.dual_clip}: expected a number > 1 + clip, or null")

    def traits(self) -> Traits:
        """A value function."""
        return replace(super().traits(), critic=self.value_net)

    @staticmethod
    def for_pipelines(told: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults where the model is a pretrained pipeline (docs/models.md)."""
        clip = {"clip": 0.01, "clip_per_dim": True}
        return {"kl_loss": 0.0, "epochs": 1, **clip, "step_weight": "noise", **of_pipelines(told)}

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for fewer walks than updates, or walks of older weights, of which V knows nothing."""
        if plan.lag:
            raise ConfigError(f"lag = {plan.lag}: agent 'ppo' learns from walks of the present weights, expected 0")
        plan.require_walks(self.updates_per_epoch)
        require_followed(self.pace, self.epochs * self.updates_per_epoch)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Every transition."""
        return transitions()

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError where no step of the chain is stochastic, or there is no such network."""
        return Learner(task, self, seed)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        updates = self.epochs * self.updates_per_epoch
        return (
            f"each rollout gives {updates} update(s) on all stochastic steps, clipped at +-{self.clip:g}; V is "
            f"fitted in {self.value_epochs} pass(es) over its states{said(self.pace, self.lr)}"
        )


class Learner:
    """PPO over the policy and time grid of a task. ``update`` takes a ``Trajectory`` of that grid."""

    def __init__(self, task: Task, config: Config, seed: int = 0) -> None:
        """``seed`` keys the order of the walks, V's first weights and the order of its states.

        Raises:
            ConfigError: no step of the chain is stochastic, or no such network.
        """
        self.policy, self.config, self.seed = task.policy, config, seed
        self.transitions = Transitions(
            task.policy, task.times, config.micro_batch, config.kl_loss > 0, config.step_weight
        )
        self.critic = ChainValue(task, config, seed)
        self.optimization = Optimization.of(task.policy, config)
        self.pace = Pace(config.pace)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout, of the policy and then of V.

        Returns:
            reward, reward_std, advantage_std (before they are normalised), loss, log_ratio_first, log_ratio_max,
            clip_fraction, approx_kl, ess, grad_norm, explained_variance (before the fit), value_loss; with kl_loss kl.

        Raises:
            NumericalError: a reward or a gradient is not finite; the update that it belongs to has not been made.
        """
        require_finite(batch.reward)
        c, features = self.config, batch.features if self.config.clip_per_dim else 1
        reference = self.transitions.refer(batch) if self.transitions.reference else None
        self.critic.see(batch.reward)
        value = self.critic.along(batch)
        gae = self.critic.advantages(batch.reward, value)
        advantage = self.normalized(gae)

        def objective(terms: Terms) -> Tensor:
            own = advantage[terms.walk, terms.step]
            return clipped_surrogate(terms.log_ratio / features, own, c.clip, c.dual_clip)

        records, norms, first = [], [], 0.0
        for epoch in range(c.epochs):
            draw = stream(self.seed, "ppo", self.iteration, epoch)
            for walks in current().passes(draw, len(batch), c.updates_per_epoch):
                part = self.transitions.accumulate(batch, *self.transitions.all(walks), objective, reference, c.kl_loss)
                first = first if norms else largest_log_ratio(part)
                records += part
                share = self.pace.heed(part, len(norms), c.epochs * c.updates_per_epoch, batch.x.shape[2:].numel())
                norms.append(self.optimization.step(share))
        explained = self.critic.explained(batch.reward, value)
        fitted = self.critic.fit(batch, gae + value, self.iteration)
        self.iteration += 1
        self.queries += batch.asked
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            "advantage_std": gae.std(correction=0).item(),
            "log_ratio_first": first,
            **self.transitions.summary(records, c.clip, features),
            "grad_norm": sum(norms) / len(norms),
            **self.pace.told(),
            "explained_variance": explained,
            **fitted,
        }

    def normalized(self, gae: Tensor) -> Tensor:
        """Eq. (1) (B, K), normalised over the steps with noise, and 0 in the others."""
        steps = self.transitions.steps.to(gae.device)
        own = gae[:, steps]
        scaled = normalized(own.flatten(), torch.zeros_like(own.flatten(), dtype=torch.int64), self.config.normalize)
        limit = self.config.advantage_clip
        return torch.zeros_like(gae).index_copy(1, steps, scaled.reshape(own.shape).clamp(-limit, limit))

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """log_ratio_max; raises NumericalError unless the ratio is 1 at the acting weights."""
        features = batch.features if self.config.clip_per_dim else 1
        return self.transitions.require_on_policy(batch, self.config.clip, features)

    def state_dict(self) -> dict:
        return state_of(self, {"reference": self.transitions.reference}, critic=self.critic, **self.pace.kept())

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {"reference": self.transitions.reference}, critic=self.critic, **self.pace.kept())
