"""OPD, on-policy distillation: the KL to a teacher's transitions, at the states of the student's own walks.

Agarwal et al. 2024 (GKD) and Lu et al. 2025 (Thinking Machines) for language models; here a token is a denoising step.

    (1)  loss = E sum_k w_k D_k,    D_k = KL(p_theta(. | x_k, c) || p_teacher(. | x_k, c)) = |m - m_t|^2 / (2 S_k^2)
         over the steps of walks of p_theta, whose states x_k are constants; both are Gaussians, of means m and m_t, of
         the one std S_k
    (2)  w_k = 1, or S_k over its mean (``step_weight``; ``transitions``, Eq. 4)
    (3)  a step without noise has no KL: it is left out, or (``kl_std``) measured as if it had this std

It asks for no reward: that of the rollout is only watched. With w_k = 1 the value of Eq. (1) is the KL of the walks,
KL(p_theta || p_teacher), exactly. Its gradient is that of the steps alone, without the part that moves the states to
where the KL is less. Both vanish where m = m_t at every state that the student comes to, and there all its walks
are the teacher's. A student that cannot become the teacher ends where Eq. (1) balances at its own states.

The teacher may have guidance of its own (``teacher_guidance``): a student without learns to do with one network call
what two did. With ``kl_std`` the chain may be deterministic, and Eq. (1) is a regression of the steps of an ODE.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import moved
from rlfusion.data import Dataset
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rl.reward_gradient import divergence
from rlfusion.rl.transitions import Weighing, require_finite
from rlfusion.rollout import RolloutSpec, Task, transitions
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import current


@dataclass(frozen=True)
class Config(Defaults):
    """Settings of on-policy distillation.

    Attributes:
        name: the algorithm.
        teacher: the model to learn from: folder of a run or of its model, or a pretrained pipeline, with the prompts,
            the latents and the noise levels of the model that learns; empty is that model as it is at first, which
            teaches by its guidance.
        teacher_guidance: guidance weight w of the teacher, as chain.guidance; null for the chain's own.
        lr: learning rate.
        step_weight: w of Eq. (1): "none", which is 1, or "noise", by which steps of little noise count less.
        kl_std: of Eq. (3), in units of the latent; 0 leaves steps without noise out.
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the walks.
        micro_batch: transitions in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    name: Literal["opd"] = "opd"
    teacher: str = ""
    teacher_guidance: float | None = None
    lr: float = 1e-3
    step_weight: Weighing = "none"
    kl_std: float = 0.0
    epochs: int = 1
    updates_per_epoch: int = 4
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        require_positive(self, "lr", "epochs", "updates_per_epoch", "micro_batch", "max_grad_norm")
        require_not_negative(self, "kl_std", "weight_decay", "warmup")
        optimizers.settle(self)
        if self.teacher_guidance is not None and self.teacher_guidance - self.teacher_guidance != 0:
            raise ConfigError(f"teacher_guidance = {self.teacher_guidance}: expected a finite number, or null")

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for fewer walks than updates, or walks of older weights."""
        if plan.lag:
            raise ConfigError(f"lag = {plan.lag}: agent 'opd' learns at states of the present weights, expected 0")
        plan.require_walks(self.updates_per_epoch)

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Every transition."""
        return transitions()

    def traits(self) -> Traits:
        """A teacher, or a copy of the base model."""
        return replace(
            super().traits(),
            rewards="watched",
            copies=int(not self.teacher),
            teacher=bool(self.teacher),
            noiseless=self.kl_std > 0,
        )

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError where no step of the chain has a KL, or the teacher cannot be opened."""
        return Learner(task, self, seed)

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""
        updates, teacher = self.epochs * self.updates_per_epoch, self.teacher or "the model that it begins with"
        guidance = "" if self.teacher_guidance is None else f" under guidance {self.teacher_guidance:g}"
        return f"each rollout gives {updates} update(s) towards the steps of {teacher}{guidance}; rewards are watched"


class Learner:
    """OPD over the policy and time grid of a task. ``update`` takes a ``Trajectory`` of that grid."""

    def __init__(self, task: Task, config: Config, seed: int = 0) -> None:
        """``seed`` keys the order of the walks.

        Raises:
            ConfigError: no step of the chain has a KL, or there is no such teacher.
        """
        self.policy, self.config, self.seed = task.policy, config, seed
        stds = task.policy.stds(task.times)
        stds = torch.where(stds == 0, config.kl_std, stds)
        self.steps = stds.nonzero().flatten()
        if not len(self.steps):
            raise ConfigError(
                f"{task.policy.kernel} has no noise at any of the {len(stds)} steps, so no KL between two of them: "
                "expected a kernel with noise, or agent.kl_std > 0, which measures such steps as if they had it"
            )
        noise = config.step_weight == "noise"
        self.weight = (stds / stds[self.steps].mean()).float() if noise else torch.ones(len(stds))
        self.teacher = task.outside.teacher(config.teacher, config.teacher_guidance)
        self.optimization = Optimization.of(task.policy, config)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout.

        Returns:
            reward, reward_std (of the walks, which nothing is learned from), kl (nats a walk, over the steps that are
            trained, without w), loss, grad_norm.

        Raises:
            NumericalError: a reward or a gradient is not finite; the update that it belongs to has not been made.
        """
        require_finite(batch.reward)
        records, norms = [], []
        for epoch in range(self.config.epochs):
            draw = stream(self.seed, "opd", self.iteration, epoch)
            for walks in current().passes(draw, len(batch), self.config.updates_per_epoch):
                records += self.accumulate(batch, walks)
                norms.append(self.optimization.step())
        self.iteration += 1
        self.queries += batch.asked
        return {
            "reward": batch.reward.mean().item(),
            "reward_std": batch.reward.std(correction=0).item(),
            **{name: torch.cat([record[name] for record in records]).mean().item() for name in ("kl", "loss")},
            "grad_norm": sum(norms) / len(norms),
        }

    def accumulate(self, batch: Trajectory, walks: Tensor) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of Eq. (1), the mean over ``walks``."""
        walk, step = self._all(walks)

        def part(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            kl = self._apart(batch, walk[rows], step[rows])
            loss = kl * moved(self.weight[step[rows]], kl.device)
            record = {"loss": loss, "kl": kl}
            return loss.sum() / max(1, len(walks)), {name: len(self.steps) * value for name, value in record.items()}

        ranks = current()
        return ranks.accumulate(self.policy, ranks.share(walk, len(batch)), self.config.micro_batch, part)

    def _all(self, walks: Tensor) -> tuple[Tensor, Tensor]:
        """(walk, step) of every trained transition of ``walks``, walk by walk."""
        return walks.repeat_interleave(len(self.steps)), self.steps.repeat(len(walks))

    def _apart(self, batch: Trajectory, walk: Tensor, step: Tensor) -> Tensor:
        """D of Eq. (1) of N transitions, (N,)."""
        obs, _ = batch.transitions(walk, step)
        mine = self.policy(obs)
        with torch.no_grad():
            theirs = self.teacher(obs).mean
        return divergence(mine, theirs, self.config.kl_std)

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """kl, of the first walks, in nats a walk.

        Raises:
            ConfigError: it is 0: the teacher answers as the student does.
        """
        walk, step = self._all(torch.arange(len(batch)))
        ranks = current()
        share = ranks.share(walk, len(batch))
        told = ranks.look(
            self.policy, share, self.config.micro_batch, lambda rows: {"kl": self._apart(batch, walk[rows], step[rows])}
        )
        kl = len(self.steps) * torch.cat([record["kl"] for record in ranks.gather(told)]).mean().item()
        if kl == 0:
            raise ConfigError(
                f"teacher, teacher_guidance = {self.config.teacher!r}, {self.config.teacher_guidance}: the teacher "
                "takes the student's own steps, expected another model, or other guidance than the chain's"
            )
        return {"kl": kl}

    def state_dict(self) -> dict:
        return state_of(self, {})

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {})
