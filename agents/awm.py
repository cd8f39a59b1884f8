"""Advantage-weighted matching (AWM: Xue et al. 2025; FPO: McAllister et al. 2025): the denoising loss of a final sample
in the place of its likelihood.

A sample x_0 of the acting policy is noised afresh, to x_t = alpha x_0 + sigma eps. The loss of denoising it bounds
minus its log-likelihood from above, up to a constant, so a ratio of likelihoods becomes

    (1)  l_theta(x_0; t, eps) = w(t) |y_theta(x_t, t, c) - (a x_0 + b eps)|^2 s,    w = ``time_weight``
         the mean over the d features for s = 1 (``per`` "feature"), their sum for s = d ("sample")
    (2)  log r = l_old - l_theta, both at one (t, eps): "noising", a ratio for each of the ``noisings`` of a sample;
         "sample", one for each sample, of the means over its noisings (FPO)
    (3)  loss = -min(r A, clip(r, 1 - c_low, 1 + c_high) A) + kl_loss D
         D = "own": w(t) |y_theta - y_base|^2 s;    "x0": |x0_theta - x0_base|^2 s,    at the same x_t

A is GRPO's (``advantage``, Eq. 6). l_old is that of the weights with which the update begins; (t, eps) is drawn by key,
and drawn again. Any sampler may collect, deterministic ones too; only x_0, the prompt and the reward are used.

At r = 1 the gradient is that of E[A l_theta]. With m = E[y | x_t], of the policy's own samples, and "own" it is, in y
at x_t, 2 w times

    (4)  E[A | x_t] (y_theta - m) - Cov(A, y | x_t) + kl (y_theta - y_base)

A policy that denoises its own samples has y_theta = m. It stays where y_theta = y_base + Cov(A, y | x_t) / kl. The tilt
p_base exp(R / (kl std)) has the integral of that covariance over the tilt in its place: the two are equal where it does
not change (a Gaussian under a linear reward), and to first order in 1 / kl elsewhere. Where E[A | x_t] < -kl the loss
of y at x_t has no minimum, and only the clip and new samples hold it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, NumericalError, require_not_negative, require_positive
from rlfusion.common.seeding import Key, stream
from rlfusion.common.tensors import map_cond, mean_features, moved
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import answer
from rlfusion.diffusion.parameterization import predict, solve, target
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.diffusion.schedule import level
from rlfusion.objectives import clipped_surrogate
from rlfusion.objectives.renoise import fresh, noised
from rlfusion.objectives.times import LAWS, of_chain
from rlfusion.pretrain.denoising import Denoising
from rlfusion.rl.advantage import Baseline, Scale, relative
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rl.transitions import ratio_summary, require_finite
from rlfusion.rollout import RolloutSpec, Task, samples
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import current


@dataclass(frozen=True)
class Config(Defaults):
    """Settings of AWM.

    Attributes:
        name: the algorithm.
        lr: learning rate.
        time_weight: w(t) of Eq. (1), as of pretrain.train.loss: Own(), SNR(), MinSNR(gamma=...), VLB(), ...
        times: how t is drawn: Uniform(margin=...), LogitNormal(mean=..., std=...), LogNormal(mean=..., std=...), or
            Chain(), the times from which the sampler takes its steps.
        noisings: times that each sample is noised in a pass.
        ratio: what has a ratio of its own, Eq. (2): each "noising", or each "sample".
        per: s of Eq. (1): losses are of a "feature", or of a "sample", the sum over its features.
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the samples.
        clip_low: c_low of Eq. (3).
        clip_high: c_high of Eq. (3).
        dual_clip: limit of the ratio where the advantage is negative; None is none.
        baseline: what is taken off a reward: the "mean" of its prompt, or of the others of it, "leave_one_out".
        std: by what advantages are divided: that of the "group", the "batch", or "none".
        advantage_clip: advantages are limited to +- this.
        kl_loss: coefficient of D, Eq. (3), in advantage units.
        kl_of: what D compares: the network's "own" answers (a velocity, of a flow model), or "x0".
        micro_batch: noised samples in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    name: Literal["awm"] = "awm"
    lr: float = 1e-3
    time_weight: str = "Own()"
    times: str = "Uniform(margin=0.02)"
    noisings: int = 4
    ratio: Literal["noising", "sample"] = "noising"
    per: Literal["feature", "sample"] = "feature"
    epochs: int = 1
    updates_per_epoch: int = 4
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    baseline: Baseline = "mean"
    std: Scale = "group"
    advantage_clip: float = 5.0
    kl_loss: float = 0.0
    kl_of: Literal["own", "x0"] = "own"
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        spec.parse(self.times, LAWS, "distribution of times")
        _ = Denoising(self.time_weight)  # refuses what no table holds
        require_positive(self, "lr", "noisings", "epochs", "updates_per_epoch", "clip_low", "clip_high")
        require_positive(self, "advantage_clip", "micro_batch", "max_grad_norm")
        require_not_negative(self, "kl_loss", "weight_decay", "warmup")
        optimizers.settle(self)
        if self.noisings > self.micro_batch:
            raise ConfigError(
                f"noisings = {self.noisings}: those of a sample are in one network call, expected at most "
                f"micro_batch = {self.micro_batch}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ConfigError(f"dual_clip = {self.dual_clip}: expected a number > 1 + clip_high, or null")

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for groups of one, fewer samples than updates, or samples of others than the policy."""
        if plan.lag:
            raise ConfigError(f"lag = {plan.lag}: agent 'awm' learns from samples of the present weights, expected 0")
        plan.require_groups()
        plan.require_walks(self.updates_per_epoch)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Samples and rewards."""
        return samples(steps)

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """The learner of ``task.policy``."""
        return Learner(task.policy, task.times, self, seed)

    def traits(self) -> Traits:
        """Its likelihood is a denoiser's loss."""
        return replace(super().traits(), denoises=True)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        updates = self.epochs * self.updates_per_epoch
        return (
            f"each rollout gives {updates} update(s) on its samples, noised {self.noisings} time(s) each, a ratio a "
            f"{self.ratio}, clipped at -{self.clip_low:g}, +{self.clip_high:g}"
        )


class Learner:
    """AWM. ``update`` takes the samples of a rollout."""

    def __init__(self, policy: Policy, times: Tensor, config: Config, seed: int = 0) -> None:
        """``times`` (K+1,) is the chain's grid; ``seed`` keys the order of the samples and their noise."""
        self.policy, self.config, self.seed = policy, config, seed
        self.base = frozen_copy(policy) if config.kl_loss else None
        self.times = of_chain(spec.parse(config.times, LAWS, "distribution of times"), times)
        self.matching = Denoising(config.time_weight)
        self.optimization = Optimization.of(policy, config)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout.

        Returns:
            reward, reward_std, advantage_std, loss, matching (Eq. (1), a feature), log_ratio_max, clip_fraction,
            approx_kl, ess, grad_norm; with ``kl_loss`` also kl (D of Eq. (3)).

        Raises:
            NumericalError: a reward or a gradient is not finite; no update has been made from it.
        """
        require_finite(batch.reward)
        c = self.config
        advantage = relative(batch.reward, batch.group, c.baseline, c.std, c.advantage_clip)
        parts = list(self._parts(len(batch)))
        old = [None, *(self.losses(batch, walks, key) for walks, key in parts[1:])]  # the first has its own
        records, norms = [], []
        for (walks, key), before in zip(parts, old):
            records += self.accumulate(batch, advantage, walks, key, before)
            norms.append(self.optimization.step())
        self.iteration += 1
        self.queries += batch.asked
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            "advantage_std": advantage.std(correction=0).item(),
            **ratio_summary(records, max(c.clip_low, c.clip_high)),
            "grad_norm": sum(norms) / len(norms),
        }

    def _parts(self, count: int) -> Iterator[tuple[Tensor, tuple[Key, ...]]]:
        """The samples of each optimiser step, and the key of their noise."""
        for epoch in range(self.config.epochs):
            draw = stream(self.seed, "awm", self.iteration, epoch)
            for part, walks in enumerate(current().passes(draw, count, self.config.updates_per_epoch)):
                yield walks, (self.seed, "awm noise", self.iteration, epoch, part)

    @torch.no_grad()
    def losses(self, batch: Trajectory, walks: Tensor, key: tuple[Key, ...]) -> Tensor:
        """Eq. (1) of the present weights, for every noising of the samples ``walks`` (N,): (N, noisings)."""
        if not len(walks):  # where walks whose rewards failed are left out
            return torch.empty(0, self.config.noisings)
        noise, ranks = self._noise(batch, walks, key), current()

        def part(some: Tensor) -> dict[str, Tensor]:
            return {"loss": self._compared(batch, walks, some, noise)["loss"], "rows": some}

        share = ranks.share(walks, len(batch))
        records = ranks.gather(ranks.look(self.policy, share, self._samples_a_call, part))
        found = torch.cat([record["loss"] for record in records])
        return found[torch.cat([record["rows"] for record in records]).to(found.device).argsort()]

    def accumulate(
        self, batch: Trajectory, advantage: Tensor, walks: Tensor, key: tuple[Key, ...], before: Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of Eq. (3), the mean over the samples ``walks`` (N,) and their noisings.

        ``before`` (N, noisings) is l_old; None where the present weights are the old ones.
        """
        c, noise, per_sample = self.config, self._noise(batch, walks, key), self.config.ratio == "sample"

        def part(some: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            found = self._compared(batch, walks, some, noise)
            now = found["loss"]
            log_ratio = (now.detach() if before is None else before[moved(some, before.device)]) - now
            log_ratio = log_ratio.mean(1, keepdim=True) if per_sample else log_ratio
            at = moved(walks[some], advantage.device)
            a = advantage[at][:, None].expand_as(log_ratio).flatten()
            loss = clipped_surrogate(log_ratio.flatten(), a, (c.clip_low, c.clip_high), c.dual_clip)
            record = {"loss": loss.reshape(log_ratio.shape).mean(1), "log_ratio": log_ratio.flatten()}
            record["matching"] = now.mean(1) / self._scale(batch)
            if "kl" in found:
                record["kl"] = found["kl"].mean(1)
                record["loss"] = record["loss"] + c.kl_loss * record["kl"]
            return record["loss"].sum() / len(walks), record

        ranks = current()
        return ranks.accumulate(self.policy, ranks.share(walks, len(batch)), self._samples_a_call, part)

    @property
    def _samples_a_call(self) -> int:
        return self.config.micro_batch // self.config.noisings

    def _scale(self, batch: Trajectory) -> int:
        """s of Eq. (1)."""
        return batch.x.shape[2:].numel() if self.config.per == "sample" else 1

    def _noise(self, batch: Trajectory, walks: Tensor, key: tuple[Key, ...]) -> tuple[Tensor, Tensor]:
        """t (N, noisings) and eps (N, noisings, *) of the samples ``walks``."""
        n = self.config.noisings
        t, eps = fresh(batch.x, len(walks) * n, self.policy.schedule, self.times, key)
        return t.reshape(-1, n), eps.reshape(-1, n, *eps.shape[1:])

    def _compared(
        self, batch: Trajectory, walks: Tensor, some: Tensor, noise: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Eq. (1) and, with a base, D of Eq. (3), of the samples ``walks[some]``: (M, noisings) each."""
        rows, model = walks[some].repeat_interleave(self.config.noisings), self.policy.denoiser
        t, eps = noise[0][some].flatten(), noise[1][moved(some, noise[1].device)].flatten(0, 1)
        x0 = batch.x[moved(rows, eps.device), -1]
        x, l = noised(x0, eps, t, self.policy.schedule), level(self.policy.schedule, t, x0)
        cond = map_cond(lambda held: held[moved(rows, held.device)], batch.cond)
        y, scale = answer(model, x, t, cond), self._scale(batch)
        y = y if y.itemsize >= 4 else y.float()  # a ratio is a small difference
        loss = self.matching.distance(y, target(model.kind, x0, eps, l), model.kind, l)
        found = {"loss": scale * loss.reshape(len(some), -1)}
        if self.base is not None and torch.is_grad_enabled():
            with torch.no_grad():
                base = answer(self.base.denoiser, x, t, cond)
            if self.config.kl_of == "own":
                apart = self.matching.distance(y, base, model.kind, l)
            else:
                solution = solve(model.kind, l)
                apart = mean_features((predict(solution, y, x).x0 - predict(solution, base, x).x0).square())
            found["kl"] = scale * apart.reshape(len(some), -1)
        return found

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """log_ratio_max, of the same weights at the same noise.

        Raises:
            NumericalError: it is not below a tenth of the clip range.
        """
        key, clip = (self.seed, "awm preflight"), min(self.config.clip_low, self.config.clip_high)
        once, again = (self.losses(batch, torch.arange(len(batch)), key) for _ in range(2))
        gap = (once - again).abs().max().item()
        if not gap < clip / 10:
            raise NumericalError(
                f"the ratio is not 1 before the first update: two losses of one noised sample differ by {gap:.3g}, "
                f"expected below a tenth of the clip range, {clip / 10:.3g}. The network must answer alike each time "
                "(no dropout or batch norm in training mode)"
            )
        return {"log_ratio_max": gap}

    def state_dict(self) -> dict:
        return state_of(self, {"base": self.base})

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {"base": self.base})
