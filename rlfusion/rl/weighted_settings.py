"""Settings of regression on weighted walks; the equations are those of ``weighted``."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.pretrain.denoising import Denoising
from rlfusion.pretrain.losses import make
from rlfusion.rl.advantage import exponential_weights
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.training import optimizers


@dataclass(frozen=True)
class Settings(Defaults):
    """Settings of every weighted regression.

    Attributes:
        lr: learning rate; on noised samples a smaller one, of some 1e-4.
        beta: inverse temperature of the weights exp(beta A).
        w_max: limit of exp(beta A), before it is scaled; null for none. It moves the fixed point to q min(exp(beta A),
            w_max), and the zero of A then matters.
        mean_one: divide the weights by their mean over what is regressed on; the fixed point does not change, nor the
            size of the loss with beta.
        normalize: of rewards or advantages, before beta: mean 0 and std 1 over the rollout ("batch") or each prompt
            ("group"), or as they are ("none"). The tilt of a rollout is then exp(beta A / std) with its own std, and
            does not fade as the policy narrows.
        on: what is regressed on: "noised" samples, Eq. (1), or the transitions of the "chain", Eq. (2), "centred" where
            the walks are those of the present weights.
        noisings: times that each sample is noised in a pass.
        times: how t is drawn: Uniform(margin=...), LogitNormal(mean=..., std=...), LogNormal(mean=..., std=...).
        time_weight: w(t) of Eq. (1), as of pretrain.train.loss: Own(), SNR(), MinSNR(gamma=...), ...
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the walks.
        kl: coefficient of the hold to the base model, Eq. (3).
        pretrain_weight: weight of the loss of the base model's own training, Eq. (4); 0 is none.
        pretrain_loss: that loss, as of pretrain.train.loss.
        pretrain_batch: samples of the base model's data in an update.
        label_dropout: probability that such a sample's label is replaced by "no class".
        micro_batch: noised samples or transitions in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    lr: float = 1e-3
    beta: float = 1.0
    w_max: float | None = 20.0
    mean_one: bool = True
    normalize: Literal["none", "batch", "group"] = "group"
    on: Literal["noised", "chain", "centred"] = "centred"
    noisings: int = 4
    times: str = "Uniform()"
    time_weight: str = "Own()"
    epochs: int = 2
    updates_per_epoch: int = 1
    kl: float = 0.0
    pretrain_weight: float = 0.0
    pretrain_loss: str = "Denoising()"
    pretrain_batch: int = 64
    label_dropout: float = 0.1
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        require_positive(self, "lr", "beta", "noisings", "epochs", "updates_per_epoch", "pretrain_batch")
        require_positive(self, "micro_batch", "max_grad_norm")
        require_not_negative(self, "kl", "pretrain_weight", "weight_decay", "warmup")
        optimizers.settle(self)
        if self.w_max is not None and not 0 < self.w_max < float("inf"):
            raise ConfigError(f"w_max = {self.w_max}: expected a finite number > 0, or null")
        if not 0 <= self.label_dropout <= 1:
            raise ConfigError(f"label_dropout = {self.label_dropout}: expected a probability in [0, 1]")
        _ = self.loss, make(self.pretrain_loss)  # refuses what no table holds

    @cached_property
    def loss(self) -> Denoising:
        """Eq. (1) of one sample."""
        return Denoising(self.time_weight, self.times)

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for fewer walks than updates, nothing to compare in a prompt, or "centred" stale walks."""
        if self.on == "centred" and plan.lag:
            raise ConfigError(f"lag = {plan.lag}: on 'centred' is of the present weights, expected 0 (or on = chain)")
        plan.require_walks(self.updates_per_epoch)
        if self.normalize == "group":
            plan.require_groups(" (or agent.normalize = batch)")

    def traits(self) -> Traits:
        """A copy of the base model for ``kl``; noised samples need no noise of the chain."""
        noised = self.on == "noised"
        return replace(super().traits(), copies=int(self.kl > 0), noiseless=noised, denoises=noised)

    def weights(self, advantage: Tensor) -> Tensor:
        """w of normalised advantages of any shape; ``advantage``, Eq. (5)."""
        return exponential_weights(advantage, self.beta, self.w_max, self.mean_one)

    def spread(self, advantage: Tensor) -> dict[str, float]:
        """weight_ess, the effective share (sum w)^2 / (N sum w^2) of the N weights, and clipped, the share of them that
        are at the limit.
        """
        weight = exponential_weights(advantage, self.beta, self.w_max, True).double()
        over = 0.0 if self.w_max is None else (self.beta * advantage >= math.log(self.w_max)).double().mean().item()
        return {"weight_ess": 1 / weight.square().mean().item(), "clipped": over}

    @property
    def told(self) -> str:
        """One line that says what the learner does with each rollout."""
        where = f"its samples, noised {self.noisings} time(s) each" if self.on == "noised" else "the steps of its walks"
        clip = "unclipped" if self.w_max is None else f"clipped at {self.w_max:g}"
        updates = self.epochs * self.updates_per_epoch
        return f"each rollout gives {updates} update(s) on {where}, with weights exp({self.beta:g} A) {clip}"
