"""Group-relative policy optimisation of a denoising chain (Flow-GRPO: Liu et al. 2025; DanceGRPO: Xue et al. 2025).

    (1)  A_i = (R_i - baseline) / std     ``baseline``: the mean of its prompt's walks, or of the others of them (RLOO)
                                          ``std``: of the prompt's walks, of all, or 1 (Dr. GRPO); ``advantage``, Eq. 6
    (2)  loss = -sum_{t in W} min(r A, clip(r, 1 - c_low, 1 + c_high) A) + kl_loss KL(p_theta || p_ref),   r = p / p_old
         ``decoupled``, for walks of older weights: r = p / p_prox, of the weights with which the update began, and the
         first term has the weight min(p_prox / p_old, ``behaviour_limit``) (Hilton et al. 2022; Fu et al. 2025)
    (3)  W, the trained steps: all stochastic ones, or a window of ``window`` of them which moves ``window_stride``
         steps from noise towards data every ``window_every`` rollouts, and begins anew at the end (Li et al. 2025,
         MixGRPO)
    (4)  ``outside`` "ode", MixGRPO's walks: a step outside of W is one of the probability-flow ODE,

         x_s = alpha_s x0_hat + sigma_s eps_hat

         so the only noise of a walk is its beginning and that of W. The gradient is that of E[R] in what theta does in
         W; what the steps of the ODE owe to theta is left out, as it is where they take noise. A step after W goes as
         far as ``outside_stride`` of the chain's (the "Flash" form, by a solver of first order)

    (5)  ``ratio_norm``, GRPO-Guard (Wang et al. 2025): log r has the mean -D, and a spread of its own at each step. So

         log r^ = (S / mean of S) (log r + D),     D = |mu - mu_old|^2 / 2 S^2

    (6)  ``divergence``, Flow-DPPO: D holds the steps in the place of the clip (``policy_gradient``, Eq. 5)
    (7)  ``step_draws``: a few steps of W for each walk, drawn afresh in each pass, whose loss stands for that of all of
         W (one: Flash-GRPO; with ``step_weight`` "noise", the weights of TempFlow-GRPO)
    (8)  p_ref becomes p_theta every ``reference_every`` rollouts, or where the KL exceeds ``reference_kl`` (GARDO)
    (9)  ``start`` "prompt": a prompt's walks begin with one noise (DanceGRPO); by Eq. (4) they are one walk until W

mu_old is of the weights with which the update begins. No value function: a prompt's walks are each other's baseline. On
a flow model the papers' chain is ``--chain.kernel FlowSDE(noise=0.7)``; any stochastic kernel will do. log p is the sum
over features (the released codes take the mean, with clip 1e-4: ``clip_per_dim``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import moved
from rlfusion.common.weights import learned, restore
from rlfusion.data import Dataset
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.policy import Policy
from rlfusion.objectives import behaviour_weight, clipped_surrogate, effective_share, leads_away, masked_surrogate
from rlfusion.rl import fused
from rlfusion.rl.advantage import Baseline, Scale, relative
from rlfusion.rl.agent import Defaults, Plan
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rl.pace import Pace, of_pipelines, require_followed, require_pace, said
from rlfusion.rl.target_kl import is_beyond, require_limit
from rlfusion.rl.transitions import (
    Objective,
    Terms,
    Transitions,
    Weighing,
    largest_log_ratio,
    outside,
    require_finite,
    step_weights,
)
from rlfusion.rollout import RolloutSpec, Start, Task, Trained, Window, transitions
from rlfusion.rollout.graphed import Graphed
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import current


@dataclass(frozen=True)
class Config(Defaults):
    """Settings of GRPO.

    Attributes:
        name: the algorithm.
        lr: learning rate.
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the walks.
        clip_low: c_low of Eq. (2).
        clip_high: c_high of Eq. (2).
        dual_clip: limit of the ratio where the advantage is negative; None is none.
        clip_per_dim: divide the log-ratio, and D of Eq. (6), by the number of features before the clip.
        ratio_norm: Eq. (5).
        divergence: limit of D, Eq. (6), in nats, in the place of clip_low and clip_high; None clips.
        step_weight: weights of the steps in the loss, "none" or "noise", as of DDPO.
        decoupled: as of Eq. (2); None where walks are of older weights than the update begins with (rollout.lag >= 1).
        behaviour_limit: of the weight of older walks.
        baseline: of Eq. (1): "mean", or "leave_one_out".
        std: by what Eq. (1) divides: "group", "batch", or "none".
        advantage_clip: advantages are limited to +- this.
        kl_loss: coefficient of the KL to the base model, in advantage units a nat.
        reference_every: rollouts after which the reference becomes the policy, Eq. (8); 0 keeps the base model.
        reference_kl: KL in nats a walk above which it does; None is none.
        window: trained steps, Eq. (3); 0 trains all.
        window_stride: steps by which the window moves.
        window_every: rollouts between its moves.
        step_draws: steps of the window that each walk trains in a pass, Eq. (7); 0 for all of them.
        outside: what the steps outside of the window do, Eq. (4): "noise", as the chain has it, or "ode".
        outside_stride: steps of the chain that a step after the window takes at once; with outside "ode".
        start: the noise with which a walk begins, Eq. (9): its "own", or that of its "prompt" (of all without prompts).
        micro_batch: transitions in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        target_kl: after an optimiser step whose transitions have a mean KL above this, in nats, to the weights that
            walked, leave out those that are left of the rollout; None leaves out none.
        fused: take the gradient from the rollout's own pass of the network, as of DDPO; with epochs and
            updates_per_epoch 1.
        pace: shift of a transition's mean that the updates of a rollout are to bring, as of DDPO; None keeps to lr.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    KEPT: ClassVar[dict[str, str]] = {"pace": "pace"}
    name: Literal["grpo"] = "grpo"
    lr: float = 1e-3
    epochs: int = 2
    updates_per_epoch: int = 4
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    clip_per_dim: bool = False
    ratio_norm: bool = False
    divergence: float | None = None
    step_weight: Weighing = "none"
    decoupled: bool | None = None
    behaviour_limit: float = 5.0
    baseline: Baseline = "mean"
    std: Scale = "group"
    advantage_clip: float = 5.0
    kl_loss: float = 0.05
    reference_every: int = 0
    reference_kl: float | None = None
    window: int = 0
    window_stride: int = 1
    window_every: int = 1
    step_draws: int = 0
    outside: Literal["noise", "ode"] = "noise"
    outside_stride: int = 1
    start: Start = "own"
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
        require_positive(self, "lr", "epochs", "updates_per_epoch", "clip_low", "clip_high", "advantage_clip")
        require_positive(self, "window_stride", "window_every", "outside_stride", "behaviour_limit")
        require_not_negative(self, "kl_loss", "window", "weight_decay", "warmup", "reference_every", "step_draws")
        require_positive(self, "micro_batch", "max_grad_norm")
        require_pace(self.pace)
        optimizers.settle(self)
        require_limit(self.target_kl)
        if self.fused:
            fused.require_one_update(
                {
                    "target_kl": (self.target_kl, None),
                    "epochs, updates_per_epoch": ((self.epochs, self.updates_per_epoch), (1, 1)),
                    "decoupled": (bool(self.decoupled), False),
                    "pace": (self.pace, None),
                    "ratio_norm": (self.ratio_norm, False),
                    "divergence": (self.divergence, None),
                    "step_draws": (self.step_draws, 0),
                }
            )
        require_positive(self, *(name for name in ("divergence", "reference_kl") if getattr(self, name) is not None))
        if self.ratio_norm and self.step_weight != "none":
            raise ConfigError(f"step_weight = {self.step_weight}: ratio_norm weighs by noise already, expected none")
        if (self.reference_every or self.reference_kl is not None) and not self.kl_loss:
            raise ConfigError("kl_loss = 0: no reference to move, expected reference_every = 0 and reference_kl null")
        self._require_window()
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ConfigError(f"dual_clip = {self.dual_clip}: expected a number > 1 + clip_high, or null")

    def _require_window(self) -> None:
        if self.window and self.step_draws > self.window:
            raise ConfigError(f"step_draws = {self.step_draws}: expected at most the window = {self.window}")
        if self.outside == "ode" and not self.window:
            raise ConfigError("outside = ode with window = 0, which trains all steps: expected a window, 1 at least")
        if self.outside != "ode" and self.outside_stride > 1:
            raise ConfigError(f"outside_stride = {self.outside_stride}, outside = {self.outside}: expected 1, or ode")

    @staticmethod
    def for_pipelines(told: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults where the model is a pretrained pipeline (docs/models.md)."""
        own = {"kl_loss": 0.0, "epochs": 1, "step_weight": "noise"}
        if fused.is_told(told):
            return own | {"updates_per_epoch": 1}
        return own | {"clip_low": 0.01, "clip_high": 0.01, "clip_per_dim": True, **of_pipelines(told)}

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for groups of one, fewer walks than updates, or means of weights that are not kept."""
        if plan.lag and self.decoupled is False and self.anchored:
            anchors = "ratio_norm and divergence compare with the weights with which an update begins"
            raise ConfigError(f"lag = {plan.lag}, decoupled = False: {anchors}, expected decoupled true or null")
        if self.outside_stride > 1 and plan.steps - self.window < 2:
            raise ConfigError(f"outside_stride = {self.outside_stride}: the window leaves no two steps, expected 1")
        plan.require_groups()
        plan.require_walks(self.updates_per_epoch)
        require_followed(self.pace, self.epochs * self.updates_per_epoch)
        if self.fused:
            fused.require_own_walks(plan)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Every transition, by Eq. (4) with noise in the window; where the learner is fused, with graphs of it."""
        ode, window = self.outside == "ode", self._window if self.window else None
        trained = Trained(None if ode else window) if self.fused else None
        return transitions(window if ode else None, trained, self.start)

    @property
    def anchored(self) -> bool:
        """Whether the means of the steps are compared with those of mu_old."""
        return self.ratio_norm or self.divergence is not None

    @property
    def _window(self) -> Window:
        return Window(self.window, self.window_stride, self.window_every, self.outside_stride)

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError where no step of the chain is stochastic, or fewer than the window."""
        return Learner(task.policy, task.times, self, seed)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        updates = self.epochs * self.updates_per_epoch
        trained = f"a moving window of {self.window} steps" if self.window else "all stochastic steps"
        trained += " (no noise outside)" if self.outside == "ode" else ""
        trained += f", {self.outside_stride} steps at once after it" if self.outside_stride > 1 else ""
        trained += ", of walks that begin alike" if self.start == "prompt" else ""
        return (
            f"each rollout gives {updates} update(s) on {trained}, clipped at -{self.clip_low:g}, +{self.clip_high:g}"
            f"{said(self.pace, self.lr)}"
        )


class Learner:
    """GRPO over one policy and time grid. ``update`` takes a ``Trajectory`` of that grid."""

    def __init__(self, policy: Policy, times: Tensor, config: Config, seed: int = 0) -> None:
        """``times`` (K+1,) is the chain's grid; ``seed`` keys the order of the walks.

        Raises:
            ConfigError: no step of the chain is stochastic, or fewer than the window.
        """
        self.policy, self.config, self.seed = policy, config, seed
        self.transitions = Transitions(policy, times, config.micro_batch, config.kl_loss > 0, config.step_weight)
        for name in ("window", "step_draws"):
            if (asked := getattr(config, name)) > (most := len(self.transitions.steps)):
                raise ConfigError(f"{name} = {asked}: expected at most the {most} stochastic steps")
        self.noise = step_weights(policy, times, "noise") if config.ratio_norm else None
        self.optimization = Optimization.of(policy, config)
        self.pace = Pace(config.pace)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout.

        Returns:
            reward, reward_std, advantage_std, window_first (the first trained step), loss, log_ratio_first (before the
            first step), log_ratio_max, clip_fraction (of Eq. (5) or (6) where they hold; by (6) the share without a
            gradient), approx_kl, ess, grad_norm; with kl_loss also kl (nats a walk over all steps that took noise);
            where older walks are weighed also behaviour_ess (effective share of transitions under p_prox / p_old).

        Raises:
            NumericalError: a reward or a gradient is not finite; no update has been made from it.
        """
        require_finite(batch.reward)
        walked = self._walked(batch)
        reference = walked.refer(batch) if walked.reference else None
        c, proximal = self.config, self._proximal(batch, walked)
        advantage = self.advantages(batch.reward, batch.group)
        steps = walked.steps if c.outside == "ode" else self.trained(self.iteration)
        features = batch.features if c.clip_per_dim else 1
        objective = self._objective(batch, walked, advantage, proximal)
        records, norms, first = [], [], 0.0
        for walk, step in self._parts(batch, walked.within(steps)):
            part = walked.accumulate(batch, walk, step, objective, reference, c.kl_loss, len(steps))
            first = first if norms else largest_log_ratio(part)
            records += part
            share = self.pace.heed(part, len(norms), c.epochs * c.updates_per_epoch, batch.x.shape[2:].numel())
            norms.append(self.optimization.step(share))
            if is_beyond(part, c.target_kl):
                break
        self.iteration += 1
        self.queries += batch.asked
        told = walked.summary(records, max(c.clip_low, c.clip_high), features)
        self._move_reference(told)
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            "advantage_std": advantage.std(correction=0).item(),
            "window_first": float(steps[0]),
            "log_ratio_first": first,
            **told,
            "grad_norm": sum(norms) / len(norms),
            **self.pace.told(),
            **({} if c.target_kl is None else {"updates_made": float(len(norms))}),
            **({} if proximal is None else {"behaviour_ess": effective_share(proximal[:, steps].flatten()).item()}),
        }

    def _parts(self, batch: Trajectory, trained: Transitions) -> Iterator[tuple[Tensor, Tensor]]:
        """(walk, step) of the transitions of each optimiser step."""
        if isinstance(batch, Graphed):
            yield batch.learned()
            return
        count = self.config.step_draws
        for epoch in range(self.config.epochs):
            draw = stream(self.seed, "grpo", self.iteration, epoch)
            for walks in current().passes(draw, len(batch), self.config.updates_per_epoch):
                yield trained.some(walks, count, draw) if count else trained.all(walks)

    def _objective(
        self, batch: Trajectory, walked: Transitions, advantage: Tensor, proximal: Tensor | None
    ) -> Objective:
        """The first term of Eq. (2), by Eq. (5) and (6) where they hold."""
        c, features = self.config, batch.features if self.config.clip_per_dim else 1
        anchor = walked.refer(batch, self.policy).mean if c.anchored else None

        def objective(terms: Terms) -> Tensor | dict[str, Tensor]:
            a = advantage[terms.walk]
            if anchor is None and proximal is None:
                return clipped_surrogate(terms.log_ratio / features, a, (c.clip_low, c.clip_high), c.dual_clip)
            before = 0.0 if proximal is None else proximal[terms.walk, terms.step]
            log_ratio = terms.log_ratio - before
            if anchor is None:
                told = self._clipped(log_ratio / features, a)
            else:
                told = self._anchored(terms, log_ratio, a, anchor[terms.walk, terms.step], features)
            if proximal is not None:
                told["loss"] = told["loss"] * behaviour_weight(before, c.behaviour_limit)
            return told

        return objective

    def _anchored(self, terms: Terms, log_ratio: Tensor, a: Tensor, old: Tensor, features: int) -> dict[str, Tensor]:
        """The loss of transitions of these advantages, by Eq. (5) and (6), and which the clip or the divergence holds;
        ``old`` is mu_old, (N, *).
        """
        c, apart = self.config, terms.distribution.kl(Gaussian(old, terms.distribution.std))
        if self.noise is not None:
            log_ratio = moved(self.noise, log_ratio.device)[terms.step] * (log_ratio + apart)
        log_ratio, apart = log_ratio / features, apart / features
        if c.divergence is None:
            return self._clipped(log_ratio, a)
        loss = masked_surrogate(log_ratio, a, apart, c.divergence, c.dual_clip)
        return {"loss": loss, "clip_fraction": leads_away(log_ratio, a, apart, c.divergence).float()}

    def _clipped(self, log_ratio: Tensor, a: Tensor) -> dict[str, Tensor]:
        """The clipped loss, and which the clip holds."""
        c, low, high = self.config, self.config.clip_low, self.config.clip_high
        loss = clipped_surrogate(log_ratio, a, (low, high), c.dual_clip)
        return {"loss": loss, "clip_fraction": outside(log_ratio, max(low, high))}

    def _move_reference(self, told: dict[str, float]) -> None:
        """Eq. (8), after a rollout whose updates told that."""
        c, reference = self.config, self.transitions.reference
        due = c.reference_every and self.iteration % c.reference_every == 0
        far = c.reference_kl is not None and told["kl"] > c.reference_kl
        if reference is not None and (due or far):
            restore(reference, learned(self.policy))

    def _walked(self, batch: Trajectory) -> Transitions:
        """The transitions of walks that took noise in all stochastic steps, or by Eq. (4) in those with a density."""
        if self.config.outside == "noise":
            return self.transitions
        assert batch.log_prob is not None  # whole walks have it
        return self.transitions.within((~batch.log_prob.isnan()).any(0).nonzero().flatten().cpu())

    def _proximal(self, batch: Trajectory, walked: Transitions) -> Tensor | None:
        """log p_prox - log p_old of every transition, (B, K), where walks are weighed; None where they are not."""
        decoupled, stale = self.config.decoupled, batch.version < self.iteration
        return walked.staleness(batch) if (stale if decoupled is None else decoupled) else None

    def advantages(self, reward: Tensor, group: Tensor) -> Tensor:
        """Eq. (1), (B,), limited to +- advantage_clip."""
        return relative(reward, group, self.config.baseline, self.config.std, self.config.advantage_clip)

    def trained(self, iteration: int) -> Tensor:
        """The steps of Eq. (3) in a rollout, falling in noise."""
        steps = self.transitions.steps
        return self.config._window.of(steps, iteration) if self.config.window else steps

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """log_ratio_max; raises NumericalError unless the ratio is 1 at the acting weights."""
        features = batch.features if self.config.clip_per_dim else 1
        return self._walked(batch).require_on_policy(batch, min(self.config.clip_low, self.config.clip_high), features)

    def state_dict(self) -> dict:
        return state_of(self, {"reference": self.transitions.reference}, **self.pace.kept())

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {"reference": self.transitions.reference}, **self.pace.kept())
