"""Diffusion-DPO (Wallace et al. 2024), online: pairs drawn from the policy's own samples as in Guo et al. 2024.

In every prompt the best samples of a rollout are paired with its worst, and both of a pair are noised to one time with
one noise:

    (1)  d(x_0) = |y_theta(x_t) - y|^2 - |y_ref(x_t) - y|^2          the network's error beside the reference's
    (2)  loss = -log sigmoid( -beta [ d(x_0 of the winner) - d(x_0 of the loser) ] )

y is what ``error`` names ("eps" in the paper), summed over features; the paper's beta T omega is our ``beta``. For
pairs drawn at random from the reference and preferred by a Bradley-Terry model the optimum of Eq. (2) on exact
likelihoods is the reference tilted by that preference, with strength 1 / beta; here Eq. (1) stands for a likelihood and
the best meet the worst, so there is no such closed form. ``reference_every`` moves the reference to the policy
(iterative DPO). Pairs whose rewards are equal have no winner and are left out, and counted.

With ``data`` it is the paper's own, offline: the pairs are stored ones, which an update draws epoch by epoch (``rl``'s
``stored``), and the prompts' scores, where there are such, take the place of rewards. No walk is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlfusion.common import spec
from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import Cond, map_cond, moved, sum_features
from rlfusion.common.weights import learned, restore
from rlfusion.data import Dataset
from rlfusion.diffusion.parameterization import target
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.diffusion.schedule import level
from rlfusion.objectives.renoise import fresh, noised
from rlfusion.objectives.times import TIMES
from rlfusion.rl.advantage import pair
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rl.stored import Pairs, compared
from rlfusion.rl.transitions import require_finite
from rlfusion.rollout import RolloutSpec, Task, prefix, samples
from rlfusion.rollout.outside import Stored
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization, average
from rlfusion.training.ranks import current

DRAWN = 64
"""Stored pairs of an update, unless told otherwise."""


@dataclass(frozen=True)
class Config(Defaults):
    """Settings of Diffusion-DPO.

    Attributes:
        name: the algorithm.
        data: stored pairs, or images with scores, in the place of rollouts (docs/inputs.md); empty for rollouts.
        batch: stored pairs of an update; null is 64 with data.
        lr: learning rate.
        beta: strength of the hold to the reference, in units of squared error summed over features.
        error: what the errors of Eq. (1) are of: "v", "eps" or "x0".
        pairs: share of each prompt's samples that become winners, and as many losers, in (0, 1/2]; each of stored
            pairs is one.
        noisings: times that each pair is noised in a pass.
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the pairs.
        times: how t is drawn: Uniform(margin=...), LogitNormal(mean=..., std=...), LogNormal(mean=..., std=...).
        reference_every: rollouts after which the reference becomes the policy; 0 keeps the base model.
        micro_batch: noised samples in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    name: Literal["dpo"] = "dpo"
    data: str = ""
    batch: int | None = None
    lr: float = 3e-4
    beta: float = 0.5
    error: Literal["v", "eps", "x0"] = "v"
    pairs: float = 0.25
    noisings: int = 4
    epochs: int = 1
    updates_per_epoch: int = 4
    times: str = "Uniform(margin=0.02)"
    reference_every: int = 0
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", absolute(self.data))
        spec.parse(self.times, TIMES, "distribution of times")
        require_positive(self, "lr", "beta", "noisings", "epochs", "updates_per_epoch", "micro_batch", "max_grad_norm")
        require_not_negative(self, "reference_every", "weight_decay", "warmup")
        optimizers.settle(self)
        if not 0 < self.pairs <= 0.5:
            raise ConfigError(f"pairs = {self.pairs}: expected a share in (0, 0.5]")
        if self.batch is not None:
            require_positive(self, "batch")
            if not self.data:
                raise ConfigError(f"batch = {self.batch}: pairs come from rollouts, expected null, or agent.data")

    def traits(self) -> Traits:
        """The reference; stored pairs ask for no reward."""
        return replace(super().traits(), rewards="none" if self.data else "learned", copies=1, denoises=True)

    @property
    def drawn(self) -> int:
        """The stored pairs of an update."""
        return self.batch or DRAWN

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for groups without a pair, or fewer stored pairs than optimiser steps."""
        if self.data:
            if self.updates_per_epoch > (most := self.drawn // plan.shares):
                raise ConfigError(
                    f"updates_per_epoch = {self.updates_per_epoch}: expected at most {most}, of batch = {self.drawn} "
                    "pairs"
                )
            return
        if int(self.pairs * plan.samples_per_prompt) < 1:
            raise ConfigError(
                f"samples_per_prompt = {plan.samples_per_prompt}: expected at least {1 / self.pairs:g}, for a pair"
            )

    def check_stored(self, stored: Callable[[str], Stored]) -> None:
        """Raises ConfigError for stored images that ``stored`` cannot open, or that give no pair."""
        if self.data:
            compared(stored(self.data), self.data, self.pairs)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Samples and rewards; of stored pairs nothing, walks that stop before their first step."""
        return prefix(0, 0) if self.data else samples(steps)

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """The learner of ``task.policy``; raises ConfigError where the stored pairs cannot be opened."""
        stored = Pairs(task, self.data, self.pairs, self.drawn, seed) if self.data else None
        return Learner(task.policy, self, seed, stored)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        updates = self.epochs * self.updates_per_epoch
        if self.data:
            return f"no rollouts: {self.drawn} stored pairs give {updates} optimiser step(s); rewards are watched"
        return (
            f"the best {self.pairs:.0%} of each prompt are paired with its worst; a rollout gives {updates} update(s)"
        )


class Learner:
    """Diffusion-DPO. ``update`` takes the samples of a rollout; of ``stored`` pairs it looks at none."""

    def __init__(self, policy: Policy, config: Config, seed: int = 0, stored: Pairs | None = None) -> None:
        self.stored = stored
        self.policy, self.config, self.seed = policy, config, seed
        self.reference = frozen_copy(policy)
        self.times = spec.parse(config.times, TIMES, "distribution of times")
        self.optimization = Optimization.of(policy, config)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout, or of the stored pairs that are due.

        Returns:
            reward, reward_std (of a rollout), pairs (with a winner), loss, accuracy (share of pairs that the implicit
            reward orders as the reward does), margin, grad_norm; without a pair only the first three, and grad_norm 0.

        Raises:
            NumericalError: a reward or a gradient is not finite; no update has been made from it.
        """
        if self.stored is None:
            require_finite(batch.reward)
            winner, loser = pair(batch.reward, batch.group, self.config.pairs)
            told = {"reward": batch.reward.mean().item(), "reward_std": batch.reward.std(correction=0).item()}
            asked = batch.asked
        else:
            batch, told, asked = self.stored.draw(self.iteration), {}, 0
            winner = torch.arange(0, len(batch), 2, device=batch.x.device)
            loser = winner + 1
        records, norms = [], []
        for epoch in range(self.config.epochs if len(winner) else 0):
            draw = stream(self.seed, "dpo", self.iteration, epoch)
            parts = current().passes(draw, len(winner), min(self.config.updates_per_epoch, len(winner)))
            for part, rows in enumerate(parts):
                at = rows.expand(self.config.noisings, -1).flatten().to(winner.device)
                key = (self.seed, "dpo noise", self.iteration, epoch, part)
                records += self.accumulate(batch, winner[at], loser[at], key)
                norms.append(self.optimization.step())
        self.iteration += 1
        self.queries += asked
        if self.config.reference_every and self.iteration % self.config.reference_every == 0:
            restore(self.reference, learned(self.policy))
        return {
            **told,
            "pairs": float(len(winner)),
            **(average(records) if records else {}),
            "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        }

    def accumulate(self, batch: Trajectory, winner: Tensor, loser: Tensor, key: tuple) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of Eq. (2), the mean over the pairs (winner[i], loser[i]), each noised by itself."""
        good, bad = batch.x[winner, -1], batch.x[loser, -1]
        t, eps = fresh(batch.x, len(winner), self.policy.schedule, self.times, key)

        def part(some: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            at = moved(some, winner.device)
            x0, prompts = torch.cat([good[at], bad[at]]), torch.cat([winner[at]] * 2)
            cond = map_cond(lambda held: held[moved(prompts, held.device)], batch.cond)
            gap = self._gap(x0, torch.cat([eps[at]] * 2), torch.cat([t[some]] * 2), cond)
            margin = -self.config.beta * (gap[: len(some)] - gap[len(some) :])
            loss = -logsigmoid(margin)
            record = {"loss": loss, "accuracy": (margin > 0).float(), "margin": margin}
            return loss.sum() / len(winner), {name: value.mean() for name, value in record.items()}

        ranks = current()
        share = ranks.share(winner, len(batch))
        return ranks.accumulate(self.policy, share, max(1, self.config.micro_batch // 2), part)

    def _gap(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Eq. (1), (N,)."""
        x, l = noised(x0, eps, t, self.policy.schedule), level(self.policy.schedule, t, x0)
        y = target(self.config.error, x0, eps, l)
        mine = target(self.config.error, *self.policy.denoiser(x, t, cond), l)
        with torch.no_grad():
            theirs = target(self.config.error, *self.reference.denoiser(x, t, cond), l)
        return sum_features((mine - y).square()) - sum_features((theirs - y).square())

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """The number of pairs that the batch gives, or that are stored."""
        if self.stored is not None:
            return {"pairs": float(len(self.stored))}
        return {"pairs": float(len(pair(batch.reward, batch.group, self.config.pairs)[0]))}

    def state_dict(self) -> dict:
        return state_of(self, {"reference": self.reference})

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {"reference": self.reference})
