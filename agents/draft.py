"""DRaFT (Clark et al. 2023; handbook 3.3.1): the gradient of the reward through the last steps of the walk.

    (1)  full:  loss = -R(x_0, c), x_0 the end of the walk x_s = mean_theta(x_t, c) + S z, differentiated through every
         step with the noise z held: grad J exactly
    (2)  last:  x at the last K steps is a constant. Workers walk to it without gradients; cheaper, and biased
    (3)  lv (K = 1, lower variance):  the mean of -R over x_0 and n more ends
             x_t' = alpha x_0 + sigma eps',   x_0' = the last step from x_t',        x_0 in it a constant
    (4)  with ``recompute`` the backward pass computes each step's activations again: a walk of K steps then holds K
         latents and the activations of one step, for a third more time; "halves" makes the two answers of guidance one
         after the other, and holds the activations of one of them (K = 1, too)

The learner's steps take the noise that sampling would, so their end is that of the worker's own walk. Any kernel will
do, DDIM(eta=0) too: a pathwise gradient needs no density.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.seeding import normal
from rlfusion.common.tensors import Cond, map_cond, staged
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import apart, guidance_in
from rlfusion.diffusion.policy import Observation, frozen_copy
from rlfusion.objectives.renoise import noised
from rlfusion.rl import reward_gradient
from rlfusion.rl.agent import Plan, Traits
from rlfusion.rl.reward_gradient import Learner, Part, Terms, divergence
from rlfusion.rollout import RolloutSpec, Task, prefix, rollout_noise

HALVES = "halves"


@dataclass(frozen=True)
class Config(reward_gradient.Settings):
    """Settings of DRaFT.

    Attributes:
        name: the algorithm.
        form: gradients through every step ("full"), the last ones ("last"), or the last step from several noised ends
            ("lv").
        steps: K, the steps of form "last".
        renoisings: n, the further ends of form "lv"; each asks for one more reward a walk.
        recompute: make the activations of a step again in the backward pass, where more than one step has gradients;
            "halves" those of each of the two answers of guidance by itself, for half of the activations' memory.
    """

    name: Literal["draft"] = "draft"
    form: Literal["last", "full", "lv"] = "last"
    steps: int = 1
    renoisings: int = 2
    recompute: bool | Literal["halves"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "steps", "renoisings")
        if not isinstance(self.recompute, bool) and self.recompute != HALVES:  # 1 and 1.0 are equal to True
            raise ConfigError(f"recompute = {self.recompute!r}: expected true, false or {HALVES}")
        if self.form != "last" and self.steps != 1:
            raise ConfigError(f"steps = {self.steps}: form {self.form!r} has its own, expected form 'last' or 1")

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for too many steps, fewer walks than updates, or states of older weights."""
        super().check(plan)
        if plan.lag and self.trained(plan.steps) < plan.steps:
            raise ConfigError(
                f"lag = {plan.lag}: agent 'draft' goes on from states of the present weights, expected 0 (or form "
                "'full', which begins with noise)"
            )
        if self.steps > plan.steps:
            raise ConfigError(f"steps = {self.steps}: expected at most the {plan.steps} of the chain")

    def trained(self, steps: int) -> int:
        """The number of steps with gradients in a chain of ``steps`` steps."""
        return steps if self.form == "full" else self.steps

    def traits(self) -> Traits:
        """The usual ones; and whether the answers of guidance have their activations one after the other."""
        return replace(super().traits(), halves=self.recompute == HALVES)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """The state before the trained steps."""
        begin = steps - self.trained(steps)
        return prefix(begin, begin)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        through = "every step" if self.form == "full" else f"the last {self.steps} step(s)"
        asked = 1 + self.renoisings if self.form == "lv" else 1
        return (
            f"each rollout gives {self.epochs * self.updates_per_epoch} update(s) through {through}, and asks for "
            f"{asked * self.epochs} reward(s) a walk"
        )

    def learner(self, task: Task, data: Dataset, seed: int) -> Learner:
        """Raises ConfigError where the reward has no gradient, or there are no halves."""
        if self.recompute == HALVES and guidance_in(task.policy) is None:
            raise ConfigError(
                f"recompute = {HALVES}: this chain has no guidance by two answers, expected true or false (and a "
                "smaller micro_batch)"
            )
        return Learner(task, self, Ends(task, self, seed), seed)


class Ends:
    """The last steps of walks, with gradients, and the rewards of their ends."""

    def __init__(self, task: Task, config: Config, seed: int) -> None:
        self.task, self.config, self.seed = task, config, seed
        self.steps = len(task.times) - 1
        self.first = self.steps - config.trained(self.steps)
        self.each = config.recompute is True and config.trained(self.steps) > 1
        self.noisy = bool((task.policy.stds(task.times)[self.first :] > 0).any())
        self.reference = frozen_copy(task.policy) if config.kl_loss else None

    def __call__(self, part: Part) -> Terms:
        with apart(self.task.policy, self.reference) if self.config.recompute == HALVES else nullcontext():
            return self._terms(part)

    def _terms(self, part: Part) -> Terms:
        x, kl = self.walk(part)
        if self.config.form != "lv":
            reward = self.task.score(x, part.cond)
            return Terms(reward, -reward, kl if self.reference else None)
        again, more = self._again(x.detach(), part)
        ends = 1 + self.config.renoisings
        x = torch.cat([x[:, None], again.unflatten(0, (-1, ends - 1))], 1).flatten(0, 1)
        reward = self.task.score(x, _repeat(part.cond, ends))
        kl = (kl + more.unflatten(0, (-1, ends - 1)).sum(1)) / ends
        return Terms(reward, -reward.unflatten(0, (-1, ends)).mean(1), kl if self.reference else None)

    def walk(self, part: Part) -> tuple[Tensor, Tensor]:
        """The ends (n, *) of the walks, and D summed over their steps (n,); Eq. (1), (2), (4)."""
        noise = self._noise(part)
        x, kl = part.x, part.x.new_zeros(len(part.x))
        for k in range(self.first, self.steps):
            if self.each:
                x, more = checkpoint(self._step, x, k, part.cond, noise[:, k + 1], use_reentrant=False)
            else:
                x, more = self._step(x, k, part.cond, noise[:, k + 1])
            kl = kl + more
        return x, kl

    def _noise(self, part: Part) -> Tensor:
        """The walks' own noise (n, K+1, *); not drawn where no trained step takes any, as in most last steps."""
        if not self.noisy:
            return torch.zeros_like(part.x)[:, None].expand(-1, self.steps + 1, *self.task.shape)
        drawn = rollout_noise(self.seed, part.iteration, part.rows.tolist(), self.steps, self.task.shape)
        return staged(drawn.to(part.x.dtype), part.x.device)

    def _step(self, x: Tensor, k: int, cond: Cond, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Step k from x, and its D."""
        obs = Observation(x, self.task.times[k], self.task.times[k + 1], cond)
        distribution = self.task.policy(obs)
        if self.reference is None:
            return distribution.sample(noise), noise.new_zeros(len(x))
        kl = divergence(distribution, self.reference(obs).mean, self.config.kl_std)
        return distribution.sample(noise), kl

    def _again(self, x: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """The n more ends of each walk that ended in x, (n walks, *) walk by walk, and their D; Eq. (3)."""
        n, key = self.config.renoisings, (self.seed, "draft", part.iteration, part.epoch)
        drawn = normal(key, part.rows.tolist(), (2, n, *self.task.shape))
        eps, z = staged(drawn.to(x.dtype), x.device).unbind(1)
        x_t = noised(x[:, None], eps, self.task.times[-2], self.task.policy.schedule)
        return self._step(x_t.flatten(0, 1), self.steps - 1, _repeat(part.cond, n), z.flatten(0, 1))


def _repeat(cond: Cond, n: int) -> Cond:
    """Each row of a condition n times."""
    return map_cond(lambda c: c.repeat_interleave(n, 0), cond)
