"""DDPO (Black et al. 2023; handbook 3.3.2, corrected): policy gradient over every denoising step.

    (1)  grad J = E sum_t grad log p_theta(x_s | x_t, c) A(x_0, c)
    (2)  SF:  one step on -sum_t log p A     IS:  several on -sum_t min(r A, clip(r, 1 - c, 1 + c) A), r_t = p / p_old
    (3)  ``kl_loss`` adds sum_t KL(p_theta(. | x_t) || p_ref(. | x_t)), analytic, at the states of the walk; its
         gradient leaves out how the states themselves depend on theta
    (4)  ``kl_reward`` takes sum_t [ log p_old - log p_ref ](x_s | x_t) of the walk off its reward: the whole KL of the
         walks, sampled, so that an action pays for its own share

States and actions are stored by the rollout and enter as constants. log p is the sum over features; with
``clip_per_dim`` the ratio of the clip is exp((log p - log p_old) / d), for d features, so that one clip range fits all
sizes. A step without noise (the last one, to clean data) has no density: it is excluded, and with it the pathwise part
of the gradient through that step. All transitions of an update are flattened into calls of ``micro_batch`` rows.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlfusion.advantage import RunningAdvantage, group_relative
from rlfusion.agent import Plan
from rlfusion.data import Dataset
from rlfusion.errors import ConfigError, NumericalError, require_not_negative, require_positive
from rlfusion.gaussian import Gaussian
from rlfusion.learner import Optimization, average
from rlfusion.objectives import clipped_surrogate, score_function
from rlfusion.policy import Policy, require_stochastic
from rlfusion.rollout import Needs, Task, transitions
from rlfusion.seeding import stream
from rlfusion.trajectory import Trajectory


@dataclass(frozen=True)
class Config:
    """Settings of DDPO.

    Attributes:
        name: the algorithm.
        form: "is" (importance sampling, several epochs, clipped) or "sf" (score function, one on-policy step).
        lr: learning rate of AdamW.
        epochs: passes over each rollout; None is 2, or the 1 that "sf" allows.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the walks; None is 4, or 1 for "sf".
        clip: clip range c of the ratio.
        dual_clip: limit of the ratio where the advantage is negative and the clip does not hold it (Ye et al. 2020); a
            single outlier cannot then fill the gradient. None is none.
        clip_per_dim: divide the log-ratio by the number of features before the clip.
        advantage: normalise rewards by mean and std of the prompt's walks of this rollout ("group"), of its recent
            ones ("prompt", for few walks of a prompt; it lags behind a fast rise), or not at all ("none").
        advantage_window: rewards that the running statistics of a prompt keep.
        advantage_clip: advantages are limited to +- this.
        kl_reward: coefficient of Eq. (4), in reward units a nat.
        kl_loss: coefficient of Eq. (3), in advantage units a nat.
        step_fraction: share of the stochastic steps, drawn afresh for each walk and pass, that an update uses.
        micro_batch: transitions in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of AdamW.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    name: Literal["ddpo"] = "ddpo"
    form: Literal["is", "sf"] = "is"
    lr: float = 1e-3
    epochs: int | None = None
    updates_per_epoch: int | None = None
    clip: float = 0.2
    dual_clip: float | None = 3.0
    clip_per_dim: bool = False
    advantage: Literal["prompt", "group", "none"] = "group"
    advantage_window: int = 256
    advantage_clip: float = 5.0
    kl_reward: float = 0.0
    kl_loss: float = 0.2
    step_fraction: float = 1.0
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        if self.form == "sf" and self.schedule != (1, 1):
            raise ConfigError(
                f"epochs, updates_per_epoch = {self.schedule}: "
                "form 'sf' is on-policy and takes one step a rollout, expected 1 and 1 (or form 'is')"
            )
        if min(self.schedule) < 1:
            raise ConfigError(f"epochs, updates_per_epoch = {self.schedule}: expected at least 1")
        require_positive(self, "lr", "clip", "advantage_window", "advantage_clip", "micro_batch", "max_grad_norm")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip:
            raise ConfigError(f"dual_clip = {self.dual_clip}: expected a number > 1 + clip = {1 + self.clip}, or null")
        if not 0 < self.step_fraction <= 1:
            raise ConfigError(f"step_fraction = {self.step_fraction}: expected 0 < step_fraction <= 1")
        require_not_negative(self, "kl_reward", "kl_loss", "weight_decay")

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for too few walks, or stale ones where the algorithm is on-policy."""
        if self.advantage == "group" and plan.samples_per_prompt < 2:
            raise ConfigError(
                f"samples_per_prompt = {plan.samples_per_prompt}: expected at least 2, to compare in a prompt "
                "(or agent.advantage = prompt)"
            )
        if self.form == "sf" and plan.lag:
            raise ConfigError(f"lag = {plan.lag}: form 'sf' is on-policy, expected 0 (or form 'is')")
        if self.schedule[1] > plan.walks:
            raise ConfigError(
                f"updates_per_epoch = {self.schedule[1]}: expected at most the {plan.walks} walks of a rollout"
            )

    def needs(self, steps: int) -> Needs:
        """Every transition."""
        return transitions()

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError where no step of the chain is stochastic."""
        return Learner(task.policy, task.times, self, seed)

    @property
    def schedule(self) -> tuple[int, int]:
        """(passes over a rollout, optimiser steps in a pass), the form's own where they are None."""
        usual = (1, 1) if self.form == "sf" else (2, 4)
        return (
            usual[0] if self.epochs is None else self.epochs,
            usual[1] if self.updates_per_epoch is None else self.updates_per_epoch,
        )

    def plan(self) -> str:
        """What happens to each rollout, in a line."""
        if self.form == "sf":
            return "on-policy: each rollout gives 1 update; the ratio is 1 by construction and nothing is clipped"
        epochs, updates_per_epoch = self.schedule
        updates = epochs * updates_per_epoch
        first = (
            "the first is on-policy (ratio 1), the others are clipped at" if updates > 1 else "on-policy, clip unused:"
        )
        return f"each rollout gives {updates} update(s): {first} +-{self.clip:g}"


class Learner:
    """DDPO over one policy and time grid. ``update`` takes a ``Trajectory`` of that grid."""

    def __init__(self, policy: Policy, times: Tensor, config: Config, seed: int = 0) -> None:
        """``times`` (K+1,) is the chain's grid; ``seed`` keys the draws of steps and walks.

        Raises:
            ConfigError: no step of the chain is stochastic.
        """
        self.policy, self.config, self.seed = policy, config, seed
        self.trainable = require_stochastic(policy, times).nonzero().flatten()
        self.optimization = Optimization(policy, config.lr, config.weight_decay, config.max_grad_norm, config.ema_decay)
        self.running = RunningAdvantage(window=config.advantage_window)
        self.reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_reward or config.kl_loss else None
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout.

        Returns:
            reward, reward_std, advantage_std, loss, log_ratio_max, clip_fraction, approx_kl, grad_norm; with a
            reference also kl (nats a walk at the states of the rollout, averaged over its updates).

        Raises:
            NumericalError: a reward or a gradient is not finite; no update has been made from it.
            ConfigError: more updates an epoch than walks.
        """
        epochs, updates_per_epoch = self.config.schedule
        if len(batch) < updates_per_epoch:
            raise ConfigError(f"updates_per_epoch = {updates_per_epoch}: expected at most the {len(batch)} walks")
        if not bool(batch.reward.isfinite().all()):
            raise NumericalError(
                f"rewards {(~batch.reward.isfinite()).nonzero().flatten().tolist()[:10]} are not finite"
            )
        reference, log_ratio = self._refer(batch) if self.reference else (None, 0.0)
        reward = batch.reward - self.config.kl_reward * log_ratio
        advantage = self.advantages(reward, batch.group)
        records, norms = [], []
        for epoch in range(epochs):
            draw = stream(self.seed, "ddpo", self.iteration, epoch)
            order = torch.from_numpy(draw.permutation(len(batch)))
            for walks in order.tensor_split(updates_per_epoch):
                records += self.accumulate(batch, advantage, *self._transitions(walks, draw), reference)
                norms.append(self.optimization.step())
        self.iteration += 1
        self.queries += len(batch)
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            "advantage_std": advantage.std(correction=0).item(),
            **_summary(records, len(self.trainable)),
            "grad_norm": sum(norms) / len(norms),
        }

    def advantages(self, reward: Tensor, group: Tensor) -> Tensor:
        """(B,) advantages by the configured rule, limited to +- advantage_clip unless the rule is "none"."""
        if self.config.advantage == "none":
            return reward
        rule = self.running if self.config.advantage == "prompt" else group_relative
        return rule(reward, group).clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def accumulate(
        self,
        batch: Trajectory,
        advantage: Tensor,
        walk: Tensor,
        step: Tensor,
        reference: Tensor | None = None,
    ) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of Eq. (2) and (3) over the transitions (walk[i], step[i]), i = 1..N.

        The loss is the mean over walks of the sum over stochastic steps, whatever subset of them was drawn.
        """
        scale = len(self.trainable) / len(walk)
        records = []
        for rows in torch.arange(len(walk)).split(self.config.micro_batch):
            record = self._loss(batch, advantage, walk[rows], step[rows], reference)
            (record["loss"].sum() * scale).backward()
            records.append({name: value.detach() for name, value in record.items()})
        return records

    def log_ratio(self, batch: Trajectory, walk: Tensor, step: Tensor) -> Tensor:
        """log p_theta - log p_old of the transitions, (N,): what the preflight wants to be 0 at the acting weights."""
        return self._distribution(batch, walk, step)[1]

    @torch.no_grad()
    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """log_ratio_max, the largest |log p_theta - log p_old| on the scale that the clip sees.

        Raises:
            NumericalError: it is not below a tenth of the clip range: rollout and learner disagree about the policy.
        """
        walk = torch.arange(len(batch)).repeat_interleave(len(self.trainable))
        gap = self.log_ratio(batch, walk, self.trainable.repeat(len(batch))).abs().max().item()
        gap = gap / batch.x[0, 0].numel() if self.config.clip_per_dim else gap
        if not gap < self.config.clip / 10:
            raise NumericalError(
                f"the importance ratio is not 1 before the first update: max |log ratio| = {gap:.3g}, expected below a "
                f"tenth of the clip range, {self.config.clip / 10:.3g}. Rollout and learner must run one network in "
                "one precision and guidance (no dropout or batch norm in training mode); or the smallest noise of the "
                "chain is too small"
            )
        return {"log_ratio_max": gap}

    def _distribution(self, batch: Trajectory, walk: Tensor, step: Tensor) -> tuple[Gaussian, Tensor, Tensor]:
        obs, action = batch.transitions(walk, step)
        distribution = self.policy(obs)
        log_prob = distribution.log_prob(action)
        old = batch.log_prob[walk.to(action.device), step.to(action.device)]
        return distribution, log_prob - old, log_prob

    def _loss(
        self, batch: Trajectory, advantage: Tensor, walk: Tensor, step: Tensor, reference: Tensor | None
    ) -> dict[str, Tensor]:
        """Loss and statistics of each transition, (N,) each."""
        distribution, log_ratio, log_prob = self._distribution(batch, walk, step)
        a = advantage[walk.to(advantage.device)]
        measured = log_ratio / distribution.mean[0].numel() if self.config.clip_per_dim else log_ratio
        if self.config.form == "sf":
            loss = score_function(log_prob, a)
        else:
            loss = clipped_surrogate(measured, a, self.config.clip, self.config.dual_clip)
        record = {
            "loss": loss,
            "clip_fraction": ((measured.exp() - 1).abs() > self.config.clip).float(),
            "log_ratio": log_ratio,
            "approx_kl": log_ratio.expm1() - log_ratio,
        }
        if reference is None:
            return record
        kl = distribution.kl(self._at(distribution, reference, walk, step))
        return record | {"loss": loss + self.config.kl_loss * kl, "kl": kl}

    @staticmethod
    def _at(distribution: Gaussian, reference: Tensor, walk: Tensor, step: Tensor) -> Gaussian:
        """The reference's transition at (walk, step); it has the std of the policy's, the kernel being one."""
        device = reference.device
        return Gaussian(reference[walk.to(device), step.to(device)], distribution.std)

    def _transitions(self, walks: Tensor, draw) -> tuple[Tensor, Tensor]:
        """(walk, step), (N,) each: for each walk its own random share of the stochastic steps."""
        count = max(1, round(self.config.step_fraction * len(self.trainable)))
        if count == len(self.trainable):
            return walks.repeat_interleave(count), self.trainable.repeat(len(walks))
        chosen = draw.permuted(self.trainable.numpy()[None].repeat(len(walks), 0), axis=1)[:, :count]
        return walks.repeat_interleave(count), torch.from_numpy(chosen.copy()).flatten()

    @torch.no_grad()
    def _refer(self, batch: Trajectory) -> tuple[Tensor, Tensor]:
        """The reference's mean at every stochastic transition (B, K, *), and Eq. (4) of every walk (B,)."""
        means, ratio = torch.zeros_like(batch.x[:, 1:]), torch.zeros(len(batch), len(self.trainable)).to(batch.reward)
        walk = torch.arange(len(batch)).repeat_interleave(len(self.trainable))
        column = torch.arange(len(self.trainable)).repeat(len(batch))
        for rows in torch.arange(len(walk)).split(self.config.micro_batch):
            at, k = walk[rows].to(means.device), self.trainable[column[rows]]
            obs, action = batch.transitions(walk[rows], k)
            distribution = self.reference(obs)
            k = k.to(means.device)
            means[at, k] = distribution.mean
            old = batch.log_prob[at, k]
            ratio[at, column[rows].to(means.device)] = (old - distribution.log_prob(action)).to(ratio)
        return means, ratio.sum(1)

    def state_dict(self) -> dict:
        state = {
            "optimization": self.optimization.state_dict(),
            "running": self.running.state_dict(),
            "iteration": self.iteration,
            "queries": self.queries,
        }
        return state if self.reference is None else state | {"reference": self.reference.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimization.load_state_dict(state["optimization"])
        self.running.load_state_dict(state["running"])
        self.iteration, self.queries = state["iteration"], state["queries"]
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])


def _summary(records: list[dict[str, Tensor]], steps: int) -> dict[str, float]:
    """Means over transitions, of kl over walks of ``steps`` transitions, and the largest |log ratio|."""
    joined = {name: torch.cat([r[name] for r in records]) for name in records[0]}
    widest = joined.pop("log_ratio").abs().max()
    if "kl" in joined:
        joined["kl"] = steps * joined["kl"]
    return average([{name: value.mean() for name, value in joined.items()}]) | {"log_ratio_max": widest.item()}
