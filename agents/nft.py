"""DiffusionNFT (Zheng et al. 2025): policy optimisation on the forward process, without likelihoods.

Samples of the acting policy, theta_old, are noised afresh, and the network is pulled towards the good ones and pushed
from the bad ones at once:

    (1)  r = 1/2 + A / (2 c),    A the group-relative advantage, held in [-c, c]
    (2)  f+ = (1 - b) f_old + b f_theta,     f- = (1 + b) f_old - b f_theta          f = x0-hat(x_t, t, c), b = ``beta``
    (3)  loss = [ r |f+ - x_0|^2 / w+  +  (1 - r) |f- - x_0|^2 / w- ] c / b,         w = mean |f - x_0|, a constant
    (4)  theta_old <- eta theta_old + (1 - eta) theta after rollout i,               eta = min(eta_rate i, eta_max)

With w = 1 the minimiser is f_old + E[(2 r - 1)(x_0 - f_old) | x_t] / b: the denoiser moved along the direction that
separates good samples from bad. ``kl`` adds the paper's pull to the base model, |f_theta - f_base|^2. Any sampler may
collect, deterministic ones too; only x_0, the prompt and the reward are used.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import map_cond, mean_features, moved
from rlfusion.data import Dataset
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.objectives.renoise import fresh, noised
from rlfusion.objectives.times import TIMES
from rlfusion.rl.advantage import group_relative
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rl.transitions import require_finite
from rlfusion.rollout import RolloutSpec, Task, samples
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization, average
from rlfusion.training.ranks import current


@dataclass(frozen=True)
class Config(Defaults):
    """Settings of DiffusionNFT.

    Attributes:
        name: the algorithm.
        lr: learning rate.
        beta: b of Eq. (2).
        noisings: times that each sample is noised in a pass.
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the samples.
        advantage_clip: c of Eq. (1).
        times: how t is drawn: Uniform(margin=...), LogitNormal(mean=..., std=...), LogNormal(mean=..., std=...).
        adaptive: weigh by 1 / w, Eq. (3); else w = 1.
        kl: coefficient of the pull to the base model.
        eta_rate: growth of eta, Eq. (4), a rollout; 0 makes every rollout on-policy.
        eta_max: limit of eta.
        micro_batch: noised samples in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    name: Literal["nft"] = "nft"
    lr: float = 1e-3
    beta: float = 1.0
    noisings: int = 4
    epochs: int = 1
    updates_per_epoch: int = 4
    advantage_clip: float = 5.0
    times: str = "Uniform(margin=0.02)"
    adaptive: bool = True
    kl: float = 0.0
    eta_rate: float = 0.001
    eta_max: float = 0.5
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        spec.parse(self.times, TIMES, "distribution of times")
        require_positive(self, "lr", "beta", "noisings", "epochs", "updates_per_epoch", "advantage_clip")
        require_positive(self, "micro_batch", "max_grad_norm")
        require_not_negative(self, "kl", "eta_rate", "weight_decay", "warmup")
        optimizers.settle(self)
        if not 0 <= self.eta_max < 1:
            raise ConfigError(f"eta_max = {self.eta_max}: expected 0 <= eta_max < 1")

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for groups of one, fewer samples than updates, or samples of others than theta_old."""
        if plan.lag:
            raise ConfigError(f"lag = {plan.lag}: agent 'nft' learns from samples of theta_old alone, expected 0")
        plan.require_groups()
        plan.require_walks(self.updates_per_epoch)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Samples and rewards."""
        return samples(steps)

    def traits(self) -> Traits:
        """theta_old, and a copy of the base model for ``kl``."""
        return replace(super().traits(), copies=1 + (self.kl > 0), denoises=True)

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """The learner of ``task.policy``."""
        return Learner(task.policy, self, seed)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        updates = self.epochs * self.updates_per_epoch
        return f"each rollout gives {updates} update(s) on its samples, noised {self.noisings} time(s) each"


class Learner:
    """DiffusionNFT. ``policy`` is the one that acts, theta_old; ``trained`` is theta."""

    def __init__(self, policy: Policy, config: Config, seed: int = 0) -> None:
        self.trained, self.config, self.seed = policy, config, seed
        self.policy = frozen_copy(policy)
        self.base = frozen_copy(policy) if config.kl else None
        self.times = spec.parse(config.times, TIMES, "distribution of times")
        self.optimization = Optimization.of(policy, config)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout, and move theta_old.

        Returns:
            reward, reward_std, loss, kl (with ``kl``), eta, grad_norm.

        Raises:
            NumericalError: a reward or a gradient is not finite; no update has been made from it.
        """
        require_finite(batch.reward)
        c = self.config
        advantage = group_relative(batch.reward, batch.group).clamp(-c.advantage_clip, c.advantage_clip)
        optimality = 0.5 + advantage / (2 * c.advantage_clip)
        records, norms = [], []
        for epoch in range(c.epochs):
            draw = stream(self.seed, "nft", self.iteration, epoch)
            for part, rows in enumerate(current().passes(draw, len(batch), c.updates_per_epoch)):
                key = (self.seed, "nft noise", self.iteration, epoch, part)
                again = rows.expand(c.noisings, -1).flatten().to(batch.x.device)
                records += self.accumulate(batch, optimality, again, key)
                norms.append(self.optimization.step())
        eta = min(c.eta_rate * self.iteration, c.eta_max)
        self._follow(eta)
        self.iteration += 1
        self.queries += batch.asked
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            **average(records),
            "eta": eta,
            "grad_norm": sum(norms) / len(norms),
        }

    def accumulate(self, batch: Trajectory, optimality: Tensor, rows: Tensor, key: tuple) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of Eq. (3), the mean over ``rows`` of the batch, each noised by itself."""
        t, eps = fresh(batch.x, len(rows), self.policy.schedule, self.times, key)

        def part(some: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            at = moved(some, rows.device)
            record = self._loss(batch, optimality, rows[at], eps[at], t[some])
            return record["loss"].sum() / len(rows), {name: value.mean() for name, value in record.items()}

        ranks = current()
        return ranks.accumulate(self.trained, ranks.share(rows, len(batch)), self.config.micro_batch, part)

    def _loss(self, batch: Trajectory, optimality: Tensor, rows: Tensor, eps: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Eq. (2) and (3) of each row, (N,), noised by ``eps`` at the times ``t``."""
        c, x0, r = self.config, batch.x[rows, -1], optimality[rows]
        x, cond = noised(x0, eps, t, self.policy.schedule), map_cond(lambda held: held[rows], batch.cond)
        f = self.trained.denoiser(x, t, cond).x0
        with torch.no_grad():
            old = self.policy.denoiser(x, t, cond).x0
        towards = self._error((1 - c.beta) * old + c.beta * f, x0)
        away = self._error((1 + c.beta) * old - c.beta * f, x0)
        loss = (r * towards + (1 - r) * away) * c.advantage_clip / c.beta
        if self.base is None:
            return {"loss": loss}
        with torch.no_grad():
            base = self.base.denoiser(x, t, cond).x0
        kl = mean_features((f - base).square())
        return {"loss": loss + c.kl * kl, "kl": kl}

    def _error(self, f: Tensor, x0: Tensor) -> Tensor:
        """|f - x_0|^2 / w, the mean over features, (N,)."""
        apart = f - x0
        error = mean_features(apart.square())
        return error / mean_features(apart.detach().abs()).clamp(min=1e-5) if self.config.adaptive else error

    @torch.no_grad()
    def _follow(self, eta: float) -> None:
        """Eq. (4)."""
        for old, new in zip(self.policy.parameters(), self.trained.parameters()):
            if new.requires_grad:
                old.lerp_(new, 1 - eta)

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """Nothing can be off between rollout and learner: only the samples are used."""
        return {}

    def state_dict(self) -> dict:
        return state_of(self, {"old": self.policy, "base": self.base})

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {"old": self.policy, "base": self.base})
