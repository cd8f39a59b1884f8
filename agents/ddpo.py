"""DDPO (Black et al. 2023; handbook 3.3.2, corrected): policy gradient over every denoising step.

    (1)  grad J = E sum_t grad log p_theta(x_s | x_t, c) A(x_0, c)
    (2)  SF:  one step on -sum_t log p A     IS:  several on -sum_t min(r A, clip(r, 1 - c, 1 + c) A), r_t = p / p_old
    (3)  ``ratio`` "trajectory": one ratio a walk, r = prod_t r_t, exact away from theta_old where r_t alone is biased
    (4)  ``decoupled`` (Hilton et al. 2022), for walks of older weights: the clip holds r to the weights with which the
         update began, p_prox, and the loss has the weight min(p_prox / p_old, ``behaviour_limit``)
    (5)  ``kl_loss`` adds sum_t KL(p_theta(. | x_t) || p_ref(. | x_t)), analytic, at the states of the walk; its
         gradient leaves out how the states themselves depend on theta
    (6)  ``kl_reward`` takes sum_t [ log p_old - log p_ref ](x_s | x_t) of the walk off its reward: the whole KL of the
         walks, sampled, so that an action pays for its own share

States and actions are stored by the rollout and enter as constants. log p is the sum over features; with
``clip_per_dim`` the ratio of the clip is exp((log p - log p_old) / d), for d features, so that one clip range fits all
sizes. All transitions of an update are flattened into calls of ``micro_batch`` rows.

The last step, to clean data, has no noise and so no density. ``last_step`` "exclude" leaves it out, and with it the
pathwise part of the gradient through it (1.05 of 11 in the handbook notes' example). "pathwise" adds that part, the
gradient of the reward through that one step; the reward must be differentiable. (A floor of noise is a matter of the
chain: FlowSDE and Langevin keep noise in other steps, and a schedule with sigma(0) > 0 in the last.)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.data import Dataset
from rlfusion.diffusion.policy import Policy
from rlfusion.objectives import behaviour_weight, clipped_surrogate, effective_share, score_function
from rlfusion.rl import fused
from rlfusion.rl.advantage import RunningAdvantage, group_moments, group_relative, normalize
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rl.pace import Pace, of_pipelines, require_followed, require_pace, said
from rlfusion.rl.pathwise import PathwiseStep
from rlfusion.rl.target_kl import is_beyond, require_limit
from rlfusion.rl.transitions import Objective, Terms, Transitions, Weighing, largest_log_ratio, outside, require_finite
from rlfusion.rollout import RolloutSpec, Task, Trained, transitions
from rlfusion.rollout.graphed import Graphed
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import current


@dataclass(frozen=True)
class Config(Defaults):
    """Settings of DDPO.

    Attributes:
        name: the algorithm.
        form: "is" (importance sampling, several epochs, clipped) or "sf" (score function, one on-policy step).
        lr: learning rate.
        epochs: passes over each rollout; None is 2, or the 1 that "sf" allows.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the walks; None is 4, or 1 for "sf".
        clip: clip range c of the ratio.
        dual_clip: limit of the ratio where the advantage is negative and the clip does not hold it (Ye et al. 2020); a
            single outlier cannot then fill the gradient. None is none.
        clip_per_dim: divide the log-ratio by the number of features before the clip.
        step_weight: weights of the steps in the loss: "none", or "noise", the standard deviation of a step's noise over
            the mean of all stochastic steps. The gradient of log p is the larger the smaller the noise, and the less
            the reward owes to it: where steps differ much (SD's last ones have a twentieth of the first ones' noise)
            the last ones drown the others.
        ratio: of each step, or of the whole trajectory, Eq. (3), which takes step_fraction = 1.
        decoupled: Eq. (4); None where walks are of older weights than the update begins with (rollout.lag >= 1).
        behaviour_limit: of the weight of Eq. (4).
        last_step: what becomes of the step without noise: "exclude" or "pathwise".
        advantage: normalise rewards by mean and std of the prompt's walks of this rollout ("group"), of its recent
            ones ("prompt", for few walks of a prompt; it lags behind a fast rise), of the whole rollout ("batch"), or
            not at all ("none").
        advantage_window: rewards that the running statistics of a prompt keep.
        advantage_clip: advantages are limited to +- this.
        kl_reward: coefficient of Eq. (6), in reward units a nat.
        kl_loss: coefficient of Eq. (5), in advantage units a nat.
        step_fraction: share of the stochastic steps, drawn afresh for each walk and pass, that an update uses; drawn
            for each rollout where it is ``fused``.
        micro_batch: transitions in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        target_kl: after an optimiser step whose transitions have a mean KL above this, in nats, to the weights that
            walked, leave out those that are left of the rollout; None leaves out none.
        fused: take the gradient of a rollout's one update from its own pass of the network, whose steps then keep their
            activations until the rewards are known; ``micro_batch`` is then of the reference's passes alone.
        pace: how far the updates of a rollout are to move the mean of a transition: root mean square over the latent's
            dimensions, in standard deviations of the transition's noise. Where they move it further the learning rate
            is halved, where less doubled, up to lr; a fresh optimiser begins with a sixteenth (``rl.pace``). None keeps
            to lr.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    KEPT: ClassVar[dict[str, str]] = {"running": "advantages", "pace": "pace"}
    name: Literal["ddpo"] = "ddpo"
    form: Literal["is", "sf"] = "is"
    lr: float = 1e-3
    epochs: int | None = None
    updates_per_epoch: int | None = None
    clip: float = 0.2
    dual_clip: float | None = 3.0
    clip_per_dim: bool = False
    step_weight: Weighing = "none"
    ratio: Literal["step", "trajectory"] = "step"
    decoupled: bool | None = None
    behaviour_limit: float = 5.0
    last_step: Literal["exclude", "pathwise"] = "exclude"
    advantage: Literal["prompt", "group", "batch", "none"] = "group"
    advantage_window: int = 256
    advantage_clip: float = 5.0
    kl_reward: float = 0.0
    kl_loss: float = 0.2
    step_fraction: float = 1.0
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    target_kl: float | None = None
    fused: bool = False
    pace: float | None = None
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        if self.form == "sf" and self.schedule != (1, 1):
            expected = "form 'sf' is on-policy and takes one step a rollout, expected 1 and 1 (or form 'is')"
            raise ConfigError(f"epochs, updates_per_epoch = {self.schedule}: {expected}")
        if min(self.schedule) < 1:
            raise ConfigError(f"epochs, updates_per_epoch = {self.schedule}: expected at least 1")
        require_positive(self, "lr", "clip", "advantage_window", "advantage_clip", "micro_batch", "max_grad_norm")
        require_positive(self, "behaviour_limit")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip:
            raise ConfigError(f"dual_clip = {self.dual_clip}: expected a number > 1 + clip = {1 + self.clip}, or null")
        if not 0 < self.step_fraction <= 1:
            raise ConfigError(f"step_fraction = {self.step_fraction}: expected 0 < step_fraction <= 1")
        if self.ratio == "trajectory" and self.step_weight != "none":
            raise ConfigError(
                f"step_weight = {self.step_weight}: ratio 'trajectory' has one of all steps, expected none"
            )
        if self.ratio == "trajectory" and self.step_fraction < 1:
            raise ConfigError(f"step_fraction = {self.step_fraction}: ratio 'trajectory' is of all steps, expected 1")
        for name, told in {"pace": self.pace, "target_kl": self.target_kl}.items():
            if self.form == "sf" and told is not None:
                raise ConfigError(f"{name} = {told}: form 'sf' takes one step a rollout, expected null (or form 'is')")
        if self.form == "sf" and (self.ratio == "trajectory" or self.decoupled):
            raise ConfigError("form = sf: it has no ratio, expected ratio 'step' and decoupled false (or form 'is')")
        require_limit(self.target_kl)
        if self.fused:
            fused.require_one_update(
                {
                    "target_kl": (self.target_kl, None),
                    "epochs, updates_per_epoch": (self.schedule, (1, 1)),
                    "ratio": (self.ratio, "step"),
                    "decoupled": (bool(self.decoupled), False),
                    "last_step": (self.last_step, "exclude"),
                    "pace": (self.pace, None),
                }
            )
        if self.last_step == "pathwise" and self.advantage == "prompt":
            raise ConfigError("advantage = prompt: its scale moves, expected another rule with last_step 'pathwise'")
        require_pace(self.pace)
        require_not_negative(self, "kl_reward", "kl_loss", "weight_decay", "warmup")
        optimizers.settle(self)

    @staticmethod
    def for_pipelines(told: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults where the model is a pretrained pipeline, beside the settings that are ``told`` (docs/models.md)."""
        own: dict[str, Any] = {"kl_loss": 0.0}
        if told.get("ratio") != "trajectory":
            own |= {"step_weight": "noise"}
        if told.get("form") != "sf" and not fused.is_told(told):
            own |= {"epochs": 1, "clip": 0.01, "clip_per_dim": True, **of_pipelines(told)}
        return own

    def traits(self) -> Traits:
        """A reference for either KL; the last step may follow a reward's gradient."""
        passes, pathwise = self.schedule[0], self.last_step == "pathwise"
        return replace(super().traits(), passes=passes, copies=int(self.refers), pathwise=pathwise)

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for too few walks, or stale ones where the algorithm is on-policy."""
        if self.advantage == "group":
            plan.require_groups(" (or agent.advantage = prompt)")
        if self.form == "sf" and plan.lag:
            raise ConfigError(f"lag = {plan.lag}: form 'sf' is on-policy, expected 0 (or form 'is')")
        plan.require_walks(self.schedule[1])
        require_followed(self.pace, math.prod(self.schedule))
        if self.fused:
            fused.require_own_walks(plan)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Every transition; where the learner is fused, with the graphs of those that it takes."""
        return transitions(trained=Trained(fraction=self.step_fraction) if self.fused else None)

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError where no step of the chain is stochastic."""
        last = PathwiseStep(task) if self.last_step == "pathwise" else None
        return Learner(task.policy, task.times, self, seed, last)

    @property
    def refers(self) -> bool:
        """Whether either KL to the base model counts."""
        return bool(self.kl_reward or self.kl_loss)

    @property
    def schedule(self) -> tuple[int, int]:
        """(passes over a rollout, optimiser steps in a pass), the form's own where they are None."""
        epochs, updates = (1, 1) if self.form == "sf" or self.fused else (2, 4)
        own = self.updates_per_epoch
        return epochs if self.epochs is None else self.epochs, updates if own is None else own

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        if self.form == "sf":
            return "on-policy: each rollout gives 1 update; the ratio is 1 by construction and nothing is clipped"
        updates = math.prod(self.schedule)
        later = "the first is on-policy (ratio 1), the others are clipped at"
        first = later if updates > 1 else "on-policy, clip unused:"
        return f"each rollout gives {updates} update(s): {first} +-{self.clip:g}{said(self.pace, self.lr)}"


class Learner:
    """DDPO over one policy and time grid. ``update`` takes a ``Trajectory`` of that grid."""

    def __init__(
        self, policy: Policy, times: Tensor, config: Config, seed: int = 0, last: PathwiseStep | None = None
    ) -> None:
        """Over the grid ``times`` (K+1,); ``seed`` keys draws of steps and walks, ``last`` is the last step's part.

        Raises:
            ConfigError: no step of the chain is stochastic.
        """
        self.policy, self.config, self.seed, self.last = policy, config, seed, last
        self.transitions = Transitions(policy, times, config.micro_batch, config.refers, config.step_weight)
        self.optimization = Optimization.of(policy, config)
        self.running = RunningAdvantage(window=config.advantage_window)
        self.pace = Pace(config.pace)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout.

        Returns:
            reward, reward_std, advantage_std, loss, log_ratio_first (|log ratio| at most, before the first step: 0 up
            to rounding unless rollouts run ahead), log_ratio_max, clip_fraction, approx_kl, ess (effective share of
            the transitions under their importance weights), grad_norm; with a reference also kl (nats a walk at the
            states of the rollout, averaged over its updates); with ``target_kl`` updates_made; where Eq. (4) is at work
            behaviour_ess (effective share under p_prox / p_old, of transitions, or of walks with ``ratio``
            "trajectory").

        Raises:
            NumericalError: a reward or a gradient is not finite; no update has been made from it.
            ConfigError: more updates an epoch than walks.
        """
        if len(batch) < self.config.schedule[1]:
            raise ConfigError(f"updates_per_epoch = {self.config.schedule[1]}: expected at most {len(batch)} walks")
        require_finite(batch.reward)
        reference = self.transitions.refer(batch) if self.transitions.reference else None
        reward = batch.reward - (self.config.kl_reward * reference.log_ratio if reference else 0.0)
        advantage = self.advantages(reward, batch.group)
        proximal = self._proximal(batch)
        records, norms, first = [], [], 0.0
        for walks, walk, step in self._parts(batch):
            objective = self._objective(batch, advantage, proximal, walks)
            part = self.transitions.accumulate(batch, walk, step, objective, reference, self.config.kl_loss)
            first = first if norms else largest_log_ratio(part)
            records += part
            if self.last:
                scale = self._scale(batch.reward, batch.group)
                self.last.accumulate(batch, walks, scale, self.config.micro_batch)
            share = self.pace.heed(part, len(norms), math.prod(self.config.schedule), batch.x.shape[2:].numel())
            norms.append(self.optimization.step(share))
            if is_beyond(part, self.config.target_kl):
                break
        self.iteration += 1
        self.queries += batch.asked
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            "advantage_std": advantage.std(correction=0).item(),
            "log_ratio_first": first,
            **self.transitions.summary(records, self.config.clip, self._features(batch)),
            "grad_norm": sum(norms) / len(norms),
            **self.pace.told(),
            **({} if self.config.target_kl is None else {"updates_made": float(len(norms))}),
            **self._behaviour(proximal),
        }

    def advantages(self, reward: Tensor, group: Tensor) -> Tensor:
        """(B,) advantages by the configured rule, limited to +- advantage_clip unless the rule is "none"."""
        if self.config.advantage == "none":
            return reward
        rule = self.running if self.config.advantage == "prompt" else group_relative
        of, limit = torch.zeros_like(group) if self.config.advantage == "batch" else group, self.config.advantage_clip
        return rule(reward, of).clamp(-limit, limit)

    def _scale(self, reward: Tensor, group: Tensor) -> Tensor:
        """The factor (B,) from reward to advantage."""
        if self.config.advantage == "none":
            return torch.ones_like(reward)
        of = group if self.config.advantage == "group" else torch.zeros_like(group)
        return normalize(torch.ones_like(reward), torch.zeros_like(reward), group_moments(reward, of)[1]).to(reward)

    def _parts(self, batch: Trajectory) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The walks of each optimiser step of an update, and the (walk, step) of their transitions."""
        if isinstance(batch, Graphed):
            yield torch.arange(len(batch)), *batch.learned()
            return
        epochs, updates_per_epoch = self.config.schedule
        steps = max(1, round(self.config.step_fraction * len(self.transitions.steps)))
        whole = steps == len(self.transitions.steps)
        for epoch in range(epochs):
            draw = stream(self.seed, "ddpo", self.iteration, epoch)
            for walks in current().passes(draw, len(batch), updates_per_epoch):
                yield walks, *(self.transitions.all(walks) if whole else self.transitions.some(walks, steps, draw))

    @torch.no_grad()
    def _proximal(self, batch: Trajectory) -> Tensor | None:
        """log p_prox - log p_old of every transition, (B, K), of the weights with which this update begins; Eq. (4)."""
        decoupled, stale = self.config.decoupled, batch.version < self.iteration
        if self.config.form == "sf" or not (stale if decoupled is None else decoupled):
            return None
        return self.transitions.staleness(batch)

    def _behaviour(self, proximal: Tensor | None) -> dict[str, float]:
        """How much of the walks counts under the weights of Eq. (4)."""
        if proximal is None:
            return {}
        whole = self.config.ratio == "trajectory"
        weights = proximal.sum(1) if whole else proximal[:, self.transitions.steps.to(proximal.device)].flatten()
        return {"behaviour_ess": effective_share(weights).item()}

    def _objective(self, batch: Trajectory, advantage: Tensor, proximal: Tensor | None, walks: Tensor) -> Objective:
        """Eq. (2) to (4) for one optimiser step on ``walks``."""
        features = self._features(batch)
        if self.config.form == "sf":
            return lambda terms: score_function(terms.log_prob, advantage[terms.walk])
        if self.config.ratio == "trajectory":
            return self._whole_walks(batch, advantage, proximal, walks, features)

        def objective(terms: Terms) -> Tensor | dict[str, Tensor]:
            own = advantage[terms.walk]
            if proximal is None:
                return self._clipped(terms.log_ratio / features, own)
            log_ratio = (terms.log_ratio - (before := proximal[terms.walk, terms.step])) / features
            loss = self._clipped(log_ratio, own) * behaviour_weight(before, self.config.behaviour_limit)
            return {"loss": loss, "clip_fraction": outside(log_ratio, self.config.clip)}

        return objective

    @torch.no_grad()
    def _whole_walks(
        self, batch: Trajectory, advantage: Tensor, proximal: Tensor | None, walks: Tensor, features: int
    ) -> Objective:
        """Eq. (3): in L = log r of the walk the loss has the slope dl/dL, and dL/d log p of each of its steps is 1."""
        count, device = len(self.transitions.steps), advantage.device
        ratio = self.transitions.log_ratio(batch, *self.transitions.all(walks)).reshape(-1, count).sum(1)
        at = walks.to(device)
        before = torch.zeros_like(ratio) if proximal is None else proximal[at].sum(1)
        with torch.enable_grad():
            total = ((ratio - before) / features).requires_grad_()
            loss = self._clipped(total, advantage[at])
            loss = loss if proximal is None else loss * behaviour_weight(before, self.config.behaviour_limit)
            (slope,) = torch.autograd.grad(loss.sum(), total)
        slopes, values, held = (torch.zeros_like(advantage) for _ in range(3))
        slopes[at], values[at] = slope.to(slopes) / features, loss.detach().to(values) / count
        held[at] = outside(total, self.config.clip).to(held)

        def objective(terms: Terms) -> dict[str, Tensor]:
            own = values[terms.walk] + slopes[terms.walk] * (terms.log_prob - terms.log_prob.detach())
            return {"loss": own, "clip_fraction": held[terms.walk]}

        return objective

    def _features(self, batch: Trajectory) -> int:
        """The divisor of log-ratios before the clip."""
        return batch.features if self.config.clip_per_dim else 1

    def _clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return clipped_surrogate(log_ratio, advantage, self.config.clip, self.config.dual_clip)

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """log_ratio_max, the largest |log p_theta - log p_old| on the scale that the clip sees.

        Raises:
            NumericalError: it is not below a tenth of the clip range: rollout and learner disagree about the policy.
        """
        return self.transitions.require_on_policy(batch, self.config.clip, self._features(batch))

    def state_dict(self) -> dict:
        return state_of(self, {"reference": self.transitions.reference}, running=self.running, **self.pace.kept())

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {"reference": self.transitions.reference}, running=self.running, **self.pace.kept())
