"""Q-score matching (Psenka et al. 2023; handbook 3.3.1): the score is regressed on the gradient of a value.

    (1)  score form:  E w |s_theta(x_t, t, c) - s*|^2,   s* = anchor s_base + alpha dQ/dx_t,   s = -eps / sigma
    (2)  noise form (irom-lab/dppo, coefficient 50):   -eps* = anchor (-eps_base) + alpha dQ/dx_t
    (3)  both as  E w |eps_theta - eps*|^2,  eps* = anchor eps_base - alpha sigma dQ/dx_t, or without sigma
    (4)  Q: R on the noised sample, R on x0_hat, or a critic of rollouts (``qvalue``, ``critic``)
    (5)  reported: the KL of theta's reverse SDE to the base's (``renoise``), nats a walk

Where it leads. ``anchor`` 0 is the paper's: s = alpha dQ/dx at every noise level, with Q = R (``noised``). Langevin
dynamics (chain.kernel Langevin on a variance-exploding schedule) then sample exp(alpha R). The reverse chain of a
diffusion model, DDPM or DDIM(1), does not (erratum 76): it takes s for the score of the *noised* samples, and ends, for
R = -k (x - r)^2 / 2 and alpha = 1, at N(k r / (k - 1/2), 1 / (2 k - 1)), where exp(R) is N(r, 1 / k); for k <= 1/2 it
ends nowhere.

``anchor`` 1 is made for that chain: s* = s_base + alpha dQ/dx_t, and p exp(alpha R) / Z is sampled if Q is the soft
value log E_p[exp(alpha R(x0)) | x_t] / alpha over the base's samples p: a critic with ``value`` soft and ``acts`` base.
Others come near it, and are right at late times, where x_t tells R. The mean E_p[R | x_t], and R at the base's x0_hat,
are the soft value to first order in alpha, exact for Gaussian p and linear R, and beyond it where R is concave
(``qvalue``). With samples of the policy itself (``acts`` trained) the mean is over the density reached so far, whose
rewards vary less: it steers less.

Any sampler may collect, because only the noised samples x_t of the acting policy are used.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import Cond, cast, map_cond, mean_features, moved
from rlfusion.common.weights import learned, require_entries, restore
from rlfusion.data import Dataset
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.diffusion.schedule import level
from rlfusion.objectives import weighted_mse
from rlfusion.objectives.renoise import divergence, fresh, noised, renoise
from rlfusion.objectives.times import TIMES
from rlfusion.objectives.weighting import WEIGHTS
from rlfusion.rl import qvalue
from rlfusion.rl.advantage import group_moments
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.rl.critic import COPY, Mean, Regression, Soft, make_critic
from rlfusion.rl.transitions import require_finite
from rlfusion.rollout import RolloutSpec, Task, prefix, samples
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization, average
from rlfusion.training.ranks import current

ALPHA = {"score": 3.0, "noise": 50.0}


@dataclass(frozen=True)
class Config(Defaults):
    """Settings of Q-score matching.

    Attributes:
        name: the algorithm.
        q: what Q is: a critic ("learned", for any reward), the reward on x0_hat ("denoised"), or on the noised sample
            itself ("noised"); the last two need a differentiable reward, and each of their values is a query.
        form: "score" or "noise", Eq. (1) and (2).
        alpha: of the form, in units of ``scale``; None is 3 for "score", 50 for "noise".
        anchor: how much of the base model's score is in the target; 0 is the paper's, 1 keeps to the base.
        scale: the unit of the reward: as it is ("none"), standard deviations of the first rollout ("base"), of each
            rollout ("batch"), or of the prompt's walks in it ("group"). The last two push on as rewards draw together.
        value: what a critic learns of the reward: its mean, or its soft value, whose beta is alpha of form "score".
        acts: who draws the samples: "trained", or "base", for which a rollout's reward does not rise.
        through: whose x0_hat "denoised" looks at: the base model's, or that of the trained one as it is.
        critic: Copy(), a copy of the base's network, or a new one as of pretrain.model.net.
        critic_lr: learning rate of the critic.
        critic_updates: its optimiser steps a rollout.
        critic_batch: samples in each of them.
        memory: samples that it learns from, the newest ones, and never fewer than the last rollout's.
        times: how t is drawn: Uniform(margin=...), LogitNormal(mean=..., std=...), LogNormal(mean=..., std=...).
        weight: w, as of the error in x0: Score() is the score error, the paper's, SNR() the eps error, the released
            code's; TruncatedSNR(), SNRPlusOne(), MinSNR(gamma=...) or VLB(). It does not move the minimiser. At low
            noise a small error of the network is a large one of the score, hence the default.
        noisings: times that each sample is noised in a pass.
        lr: learning rate.
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the samples.
        micro_batch: noised samples in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets; of the critic too.
        warmup: optimiser steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    KEPT: ClassVar[dict[str, str]] = {"critic": "critic", "first": "unit"}
    name: Literal["qsm"] = "qsm"
    q: Literal["learned", "denoised", "noised"] = "learned"
    form: Literal["score", "noise"] = "score"
    alpha: float | None = None
    anchor: float = 1.0
    scale: Literal["none", "base", "batch", "group"] = "base"
    value: Literal["mean", "soft"] = "mean"
    acts: Literal["trained", "base"] = "trained"
    through: Literal["base", "trained"] = "base"
    critic: str = COPY
    critic_lr: float = 1e-3
    critic_updates: int = 100
    critic_batch: int = 256
    memory: int = 960
    times: str = "Uniform(margin=0.02)"
    weight: str = "MinSNR(gamma=1.0)"
    noisings: int = 4
    lr: float = 3e-4
    epochs: int = 1
    updates_per_epoch: int = 4
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        spec.parse(self.times, TIMES, "distribution of times")
        spec.parse(self.weight, WEIGHTS, "weight")
        require_positive(self, "critic_lr", "critic_updates", "critic_batch", "memory", "noisings", "lr", "epochs")
        require_positive(self, "updates_per_epoch", "micro_batch", "max_grad_norm")
        require_not_negative(self, "anchor", "weight_decay", "warmup")
        optimizers.settle(self)
        if self.alpha is not None:
            require_positive(self, "alpha")
        if self.value == "soft" and (self.q, self.form) != ("learned", "score"):
            raise ConfigError(f"value = soft: q, form = {self.q}, {self.form}: expected learned and score")
        if self.through == "trained" and self.q != "denoised":
            raise ConfigError(f"through = trained: q = {self.q} looks through no denoiser, expected q = denoised")

    @property
    def strength(self) -> float:
        """alpha."""
        return ALPHA[self.form] if self.alpha is None else self.alpha

    def traits(self) -> Traits:
        """A copy of the base model, and perhaps a critic."""
        return replace(super().traits(), copies=1, critic=self.critic if self.q == "learned" else "")

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for groups of one, where groups are compared, or fewer samples than updates."""
        if self.scale == "group":
            plan.require_groups()
        plan.require_walks(self.updates_per_epoch)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Samples; with rewards where a critic learns from them, else the learner asks for them itself."""
        return samples(steps) if self.q == "learned" else prefix(steps, steps)

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError where Q is a reward without gradient, or the critic cannot be made."""
        return Learner(task, self, seed)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        updates, noised = self.epochs * self.updates_per_epoch, f"noised {self.noisings} time(s) each"
        if self.q == "learned":
            return (
                f"each rollout gives {self.critic_updates} update(s) of the critic, then {updates} update(s), {noised}"
            )
        asked = 1 + self.epochs * self.noisings
        return f"each rollout gives {updates} update(s) on its samples, {noised}, and asks for {asked} reward(s) a walk"


class Learner:
    """Q-score matching. ``policy`` is the one that acts; ``trained`` is theta."""

    def __init__(self, task: Task, config: Config, seed: int = 0) -> None:
        if config.q != "learned":
            task.require_differentiable_reward()
        self.task, self.config, self.seed = task, config, seed
        self.trained, self.base = task.policy, frozen_copy(task.policy)
        self.policy = self.base if config.acts == "base" else self.trained
        self.times = spec.parse(config.times, TIMES, "distribution of times")
        self.weight = spec.parse(config.weight, WEIGHTS, "weight")
        self.critic = self._critic() if config.q == "learned" else None
        self.q: qvalue.Q = self.critic or self._of_reward()
        self.optimization = Optimization.of(task.policy, config)
        self.first: dict[str, float] | None = None
        self.iteration = self.queries = 0

    def _critic(self) -> Regression:
        c = self.config
        value = Soft(c.strength) if c.value == "soft" else Mean()
        critic = make_critic(c.critic, self.task, self.seed)
        optimization = Optimization(critic, c.critic_lr, optimizer=c.optimizer)
        return Regression(optimization, value, self.times, c.critic_updates, c.critic_batch, c.memory, self.seed)

    def _of_reward(self) -> qvalue.Q:
        if self.config.q == "noised":
            return qvalue.Noised(self.task)
        looked = self.base if self.config.through == "base" else self.trained
        return qvalue.Denoised(self.task, looked.denoiser)

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout, the critic's first.

        Returns:
            reward, reward_std, loss, q (mean), q_gradient (rms of alpha dQ/dx), kl (Eq. (5), nats a walk, after the
            updates), grad_norm; with a critic also explained_variance and critic_loss.

        Raises:
            NumericalError: a reward or a gradient is not finite; no update of the policy has been made from it.
        """
        reward = self._rewards(batch)
        require_finite(reward)
        self.optimization.clear()  # of an update that was broken off
        mean, inverse = self._moments(reward, batch.group)
        found = self._fit(batch, (reward - mean) * inverse)
        unit = torch.ones_like(reward) if self.critic else inverse
        records, norms = [], []
        for epoch in range(self.config.epochs):
            draw = stream(self.seed, "qsm", self.iteration, epoch)
            for part, rows in enumerate(current().passes(draw, len(batch), self.config.updates_per_epoch)):
                key = (self.seed, "qsm noise", self.iteration, epoch, part)
                again = rows.expand(self.config.noisings, -1).flatten().to(batch.x.device)
                records += self.accumulate(batch, unit, again, key)
                norms.append(self.optimization.step())
        found |= {**average(records), "kl": self._divergence(batch), "grad_norm": sum(norms) / len(norms)}
        self.iteration += 1
        return {"reward": reward.mean().item(), "reward_std": reward.std(correction=0).item(), **found}

    def _rewards(self, batch: Trajectory) -> Tensor:
        """The rewards (B,) of the samples, asked for here where the workers did not."""
        self.queries += batch.asked
        if batch.reward is not None:
            return batch.reward
        with torch.no_grad():
            parts = torch.arange(len(batch)).split(self.config.micro_batch)
            return torch.cat([self.task.score(*_rows(batch, rows.to(batch.x.device))) for rows in parts])

    def _moments(self, reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std of the rewards' unit, (B,) each; 1 / std is 0 while all rewards are equal."""
        scale = self.config.scale
        if self.first is None and reward.std(correction=0) > 0:
            self.first = {"mean": reward.double().mean().item(), "std": reward.double().std(correction=0).item()}
        if scale in ("group", "batch"):
            mean, std = group_moments(reward, group if scale == "group" else torch.zeros_like(group))
        else:
            first = self.first or {"mean": reward.mean().item(), "std": 0.0}
            mean, std = (torch.full_like(reward, first[name], dtype=torch.float64) for name in ("mean", "std"))
        inverse = torch.ones_like(std) if scale == "none" else torch.where(std > 0, 1 / std, 0.0)
        return mean.to(reward), inverse.to(reward)

    def _fit(self, batch: Trajectory, reward: Tensor) -> dict[str, float]:
        """Let the critic learn from the rewards in their unit."""
        if self.critic is None:
            return {}
        return self.critic.fit(replace(batch, reward=reward), self.iteration)

    def accumulate(self, batch: Trajectory, unit: Tensor, rows: Tensor, key: tuple) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of Eq. (3), the mean over ``rows`` of the batch, each noised by itself; ``unit`` (B,)
        is one of Q's in those of alpha.
        """
        t, eps = fresh(batch.x, len(rows), self.trained.schedule, self.times, key)

        def part(some: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            at = moved(some, rows.device)
            times, (x0, cond) = t[some], _rows(batch, rows[at])
            x = noised(x0, eps[at], times, self.trained.schedule)
            record = self._loss(x, times, cond, unit[rows[at]])
            return record["loss"].sum() / len(rows), {name: value.mean() for name, value in record.items()}

        ranks = current()
        records = ranks.accumulate(self.trained, ranks.share(rows, len(batch)), self.config.micro_batch, part)
        self.queries += 0 if self.critic else len(rows)  # of a reward, each is a query
        return [{**record, "q_gradient": record["q_gradient"].sqrt()} for record in records]

    def _loss(self, x: Tensor, t: Tensor, cond: Cond, unit: Tensor) -> dict[str, Tensor]:
        """Eq. (3) of each row, Q, and the mean square of alpha dQ/dx, (N,) each."""
        l = level(self.trained.schedule, t, x)
        value, gradient, anchor = self._looked(x, t, cond)
        step = self.config.strength * unit.reshape(-1, *[1] * (x.ndim - 1)) * gradient
        aim = anchor - (cast(l.sigma, step) * step if self.config.form == "score" else step)
        weight = cast(self.weight("eps", l).flatten(), step)
        loss = weighted_mse(self.trained.denoiser(x, t, cond).eps, aim, weight)
        return {"loss": loss, "q": value, "q_gradient": mean_features(step.square())}

    def _looked(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Q (N,), dQ/dx_t and anchor eps_base (N, *); of one call of the base, where Q looks through it."""
        anchor = self.config.anchor
        if anchor and isinstance(self.q, qvalue.Denoised) and self.q.denoiser is self.base.denoiser:
            value, gradient, seen = qvalue.through(self.q, x, t, cond)
            return value, gradient, anchor * seen.eps
        value, gradient = qvalue.gradient(self.q, x, t, cond)
        with torch.no_grad():
            base = anchor * self.base.denoiser(x, t, cond).eps if anchor else torch.zeros_like(x)
        return value, gradient, base

    def _divergence(self, batch: Trajectory) -> float:
        """Eq. (5), by one noising of each sample."""
        key, parts = (self.seed, "qsm kl", self.iteration), torch.arange(len(batch)).split(self.config.micro_batch)
        kl = [
            divergence(self.trained, self.base, *_rows(batch, rows.to(batch.x.device)), (*key, i))
            for i, rows in enumerate(parts)
        ]
        return torch.cat(kl).mean().item()

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """q_gradient, the rms of dQ/dx_t of a first batch, where Q is a reward.

        Raises:
            ConfigError: it is 0 everywhere.
            NumericalError: it is not finite.
        """
        if self.critic:
            return {}
        noise = renoise(batch.x[:, -1], self.trained.schedule, self.times, (self.seed, "qsm preflight"))
        _, gradient = qvalue.gradient(self.q, noise.x, noise.t, batch.cond)
        require_finite(gradient.flatten(1).norm(dim=1))
        if not bool(gradient.any()):
            raise ConfigError(
                f"reward {self.task.reward_name!r}, q = {self.config.q}: its gradient is 0 at every one of "
                f"{len(batch)} noised samples, expected a reward that changes there"
            )
        return {"q_gradient": mean_features(gradient.square()).mean().sqrt().item()}

    def state_dict(self) -> dict:
        state = {"optimization": self.optimization.state_dict(), "base": learned(self.base), "first": self.first}
        state |= {"iteration": self.iteration, "queries": self.queries}
        return state if self.critic is None else state | {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the learner", {"first": dict})
        if state["first"] is not None:
            require_entries(state["first"], {"mean": 0.0, "std": 0.0}, "the first rewards")
        self.optimization.load_state_dict(state["optimization"])
        restore(self.base, state["base"])
        self.first, self.iteration, self.queries = state["first"], state["iteration"], state["queries"]
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])


def _rows(batch: Trajectory, rows: Tensor) -> tuple[Tensor, Cond]:
    """The samples and conditions of these rows."""
    return batch.x[rows, -1], map_cond(lambda c: c[moved(rows, c.device)], batch.cond)
