"""Common part of the learners that use the reward's gradient (handbook 3.3.1; Xu et al. 2023; Clark et al. 2023).

    (1)  loss = -E l(R(decode(x0_theta), c)) + kl_loss D:  theta enters through x0_theta alone, the end of a walk that
         an algorithm makes differentiable (its ``Paths``), or a prediction of it
    (2)  D of a step = KL(N(m, s^2) || N(m_ref, s^2)) = |m - m_ref|^2 / (2 s^2), s the step's own noise S; a step
         without noise has no density, and is measured as if it had s = ``kl_std``

R must be differentiable. ``to_pixels`` limits samples to [0, 1]: a pixel beyond black or white has no gradient, as it
has no effect on the image; it comes back only through the pixels that it shares weights with.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlfusion.common import shards
from rlfusion.common.errors import ConfigError, NumericalError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import Cond, map_cond, moved
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.policy import Policy
from rlfusion.rl.agent import Defaults, Plan
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rollout import Task
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import current

PREFLIGHT = -1
"""The iteration of the walks on which a job checks its learner."""
WALKS, ADAPTERS = 4, 1e-3
"""Walks of a prompt and the learning rate of adapters, on a pretrained pipeline; the rate is TRL's for AlignProp."""


@dataclass(frozen=True)
class Settings(Defaults):
    """Settings of every learner through a reward's gradient.

    Attributes:
        lr: learning rate.
        epochs: passes over each rollout.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of the walks.
        kl_loss: coefficient of D, the KL to the base model, in units of the reward a nat. A learned reward needs it:
            its gradient leads to samples that fool it long before they are good.
        kl_std: the noise that D takes steps without noise to have, in units of the latent.
        micro_batch: walks in one graph; gradients accumulate over graphs.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    lr: float = 1e-4
    epochs: int = 1
    updates_per_epoch: int = 4
    kl_loss: float = 0.0
    kl_std: float = 0.1
    micro_batch: int = 64
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "lr", "epochs", "updates_per_epoch", "kl_std", "micro_batch", "max_grad_norm")
        require_not_negative(self, "kl_loss", "weight_decay", "warmup")
        optimizers.settle(self)

    @staticmethod
    def for_pipelines(told: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults where the model is a pretrained pipeline: few walks of a prompt, as each has a gradient of its own
        and none is compared with others, and for adapters the learning rate that is usual for them (docs/models.md).
        """
        return {"rollout.samples_per_prompt": WALKS} | ({"lr": ADAPTERS} if told.get("lora") else {})

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for fewer walks than updates."""
        plan.require_walks(self.updates_per_epoch)


class Part(NamedTuple):
    """Walks ``rows`` (n,) of the rollout ``iteration``, in its pass ``epoch``; x (n, *) is where their kept part begins
    and ``begin`` (n,) the step, both with condition ``cond``.
    """

    rows: Tensor
    x: Tensor
    begin: Tensor
    cond: Cond
    iteration: int
    epoch: int


class Terms(NamedTuple):
    """The scored samples' rewards (m,), and of each walk the loss -l(R) (n,) and D (n,), None without a reference."""

    reward: Tensor
    loss: Tensor
    kl: Tensor | None


class Paths(Protocol):
    """Continues the walks with gradients from the states where the workers stopped."""

    reference: Policy | None

    def __call__(self, part: Part) -> Terms: ...


def divergence(distribution: Gaussian, mean: Tensor, kl_std: float) -> Tensor:
    """Eq. (2), (B,), of a step with the reference's ``mean``; gradients pass through both means."""
    std = distribution.std.masked_fill(distribution.std == 0, kl_std)
    return Gaussian(distribution.mean, std).kl(Gaussian(mean, std))


def _conditions(cond: Cond, rows: Tensor) -> Cond:
    return map_cond(lambda c: c[moved(rows, c.device)], cond)


class Learner:
    """Eq. (1) over one policy. ``update`` takes a ``Trajectory`` of unscored walks that begin as ``paths`` needs."""

    def __init__(
        self,
        task: Task,
        config: Settings,
        paths: Paths,
        seed: int,
        pretraining_term: Callable[[int], Tensor] | None = None,
    ) -> None:
        """``seed`` keys the order of the walks; ``pretraining_term`` is a further loss as a function of the step.

        Raises:
            ConfigError: the reward has no gradient.
        """
        task.require_differentiable_reward()
        self.task, self.config, self.paths, self.seed = task, config, paths, seed
        self.pretraining_term = pretraining_term
        self.policy = task.policy
        self.optimization = Optimization.of(task.policy, config)
        self.iteration = self.queries = 0

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of one rollout.

        Returns:
            reward, reward_std (of the samples scored), loss, grad_norm; with a reference also kl (nats a walk), and
            with a further loss also more.

        Raises:
            NumericalError: a reward or a gradient is not finite; the update that it belongs to has not been made.
        """
        terms, norms, more = [], [], []
        updates = self.config.epochs * self.config.updates_per_epoch
        for number, (epoch, rows) in enumerate(self._passes(len(batch))):
            self.optimization.clear()  # of an update that was broken off
            terms += self._accumulate(batch, rows, epoch)
            if self.pretraining_term:
                more.append(self.pretraining_term(self.iteration * updates + number))
                more[-1].backward()
            norms.append(self.optimization.step())
        self.iteration += 1
        extra = {"more": torch.stack(more).mean().item()} if more else {}
        return self._summary(terms) | extra | {"grad_norm": sum(norms) / len(norms)}

    def _passes(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """The epoch and the walks of each optimiser step."""
        for epoch in range(self.config.epochs):
            draw = stream(self.seed, "reward gradient", self.iteration, epoch)
            for rows in current().passes(draw, count, self.config.updates_per_epoch):
                yield epoch, rows

    def _accumulate(self, batch: Trajectory, walks: Tensor, epoch: int) -> list[Terms]:
        """Accumulate the gradient of the mean over ``walks``."""

        def part(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            terms = self.paths(_part(batch, walks[rows], self.iteration, epoch))
            loss = terms.loss if terms.kl is None else terms.loss + self.config.kl_loss * terms.kl
            record = {"reward": terms.reward, "loss": loss} | ({} if terms.kl is None else {"kl": terms.kl})
            return loss.sum() / len(walks), record

        ranks = current()
        share = ranks.share(walks, len(batch))
        records = ranks.accumulate(self.policy, share, self.config.micro_batch, part)
        self.queries += sum(len(record["reward"]) for record in records)
        return [Terms(record["reward"], record["loss"], record.get("kl")) for record in records]

    def _summary(self, terms: list[Terms]) -> dict[str, float]:
        reward = torch.cat([t.reward for t in terms])
        found = {"reward": reward.mean().item(), "reward_std": reward.std(correction=0).item()}
        found["loss"] = torch.cat([t.loss for t in terms]).mean().item()
        if apart := [t.kl for t in terms if t.kl is not None]:
            found["kl"] = torch.cat(apart).mean().item()
        return found

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """reward, reward_std and grad_norm (of the loss without D) of a first micro-batch.

        Raises:
            ConfigError: the gradient of the reward, or of the loss, is 0 in every weight.
            NumericalError: it is not finite.
        """
        part = _part(batch, torch.arange(len(batch))[: self.config.micro_batch], PREFLIGHT, 0)
        terms = self.paths(part)
        norm = _norm(terms.loss.mean(), self.policy)
        if not norm > 0:  # which of the two is flat needs another graph, and only where it is to be refused
            seen = f"reward {self.task.reward_name!r} of {len(terms.reward)} samples of the base model"
            if not _norm(self.paths(part).reward.mean(), self.policy) > 0:
                raise ConfigError(f"{seen}: its gradient is 0 in every weight, expected a differentiable reward")
            low, high = terms.reward.min().item(), terms.reward.max().item()
            raise ConfigError(f"{seen}: {low:.4g} to {high:.4g}, where the loss is flat: expected another link")
        return self._summary([terms]) | {"grad_norm": norm}

    def state_dict(self) -> dict:
        return state_of(self, {"reference": self.paths.reference})

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {"reference": self.paths.reference})


def _part(batch: Trajectory, walks: Tensor, iteration: int, epoch: int) -> Part:
    """The walks of a batch from where their kept part begins."""
    begin = torch.zeros(len(batch), dtype=torch.int64) if batch.begin is None else batch.begin.cpu()
    x = batch.x[moved(walks, batch.x.device), 0]
    return Part(walks, x, begin[walks.cpu()], _conditions(batch.cond, walks), iteration, epoch)


def _norm(value: Tensor, module: nn.Module) -> float:
    """The norm of the gradient of ``value`` in the module's parameters.

    Raises:
        NumericalError: it is not finite.
    """
    wanted = [p for p in module.parameters() if p.requires_grad]
    if any(map(shards.is_split, wanted)):  # autograd knows the gathered parameters alone
        value.backward()
        norm = current().norm([p.grad for p in wanted if p.grad is not None] or [torch.zeros(())]).item()
        for p in wanted:
            p.grad = None
    else:
        found = torch.autograd.grad(value, wanted, allow_unused=True)
        norm = torch.stack([g.norm() for g in found if g is not None] or [torch.zeros(())]).norm().item()
    if norm != norm or norm == float("inf"):
        raise NumericalError(f"the gradient of the reward is not finite (norm {norm}): look at the reward")
    return norm
