"""What every learner is, and the one place where an optimiser steps.

A learner owns weights and an optimiser: ``update(batch) -> metrics``. Reward fine-tuning, pretraining and distillation
differ only in what yields the batches.

The weights that are kept are averages of those trained, with decay b_n at update n = 0, 1, ...:

    (1)  shadow <- b_n shadow + (1 - b_n) parameter
    (2)  Constant:  b_n = min(decay, (1 + n) / (10 + n)),  warmed up so that early averages forget the start
    (3)  Power:     b_n = (n / (n + 1))^(gamma + 1),  so that after N updates the i-th of them, i = 1..N, weighs
                    (i^(gamma+1) - (i-1)^(gamma+1)) / N^(gamma+1),  and the start 0       (Karras et al. 2024, Eq. 127)
    (4)             sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))            (the same, Eq. 123)

sigma_rel is the standard deviation of the weights of (3) over time, as a share of the training so far.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rlfusion.common import shards
from rlfusion.common.errors import ConfigError, NumericalError, require_decay
from rlfusion.common.weights import learned, require_entries, restore
from rlfusion.training.learning_rate import Factor, rise
from rlfusion.training.optimizers import NamedOptimizer, parse
from rlfusion.training.ranks import current

Batch = TypeVar("Batch", contravariant=True)


class Learner(Protocol[Batch]):
    """``update`` makes the optimiser steps of one batch; the state dicts hold all that resuming needs."""

    def update(self, batch: Batch) -> dict[str, float]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Decay(Protocol):
    """A rule of averaging, a frozen dataclass: the decay in [0, 1) of update ``n`` = 0, 1, ..."""

    def __call__(self, n: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """Eq. (2). decay = 0 keeps a copy of the parameters."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay = {self.decay}: expected 0 <= decay < 1")

    def __call__(self, n: int) -> float:
        return min(self.decay, (1 + n) / (10 + n))


@dataclass(frozen=True)
class Power:
    """Eq. (3), a window that grows with the training: give its relative width ``sigma_rel``, or ``gamma``.

    sigma_rel lies in (0, 12^-1/2 = 0.2887], where gamma = 0 is the plain mean; 0.05 to 0.15 is usual.
    """

    sigma_rel: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ConfigError(f"sigma_rel = {self.sigma_rel}, gamma = {self.gamma}: expected one of the two")
        if self.sigma_rel is not None and not 0 < self.sigma_rel <= 12**-0.5:
            raise ConfigError(f"sigma_rel = {self.sigma_rel}: expected 0 < sigma_rel <= 12^-1/2 = 0.2887")
        if self.gamma is not None and not 0 <= self.gamma < float("inf"):
            raise ConfigError(f"gamma = {self.gamma}: expected a finite number >= 0")

    def __call__(self, n: int) -> float:
        gamma = exponent(self.sigma_rel) if self.gamma is None else self.gamma
        return (n / (n + 1)) ** (gamma + 1)


@lru_cache
def exponent(sigma_rel: float) -> float:
    """gamma of Eq. (4), by the contraction gamma + 2 <- sqrt((gamma + 1) / (gamma + 3)) / sigma_rel, from above."""
    gamma = 1 / sigma_rel - 2
    for _ in range(100):  # its slope is at most 2 / 3, at gamma = 0
        gamma = math.sqrt((gamma + 1) / (gamma + 3)) / sigma_rel - 2
    return gamma


EMA_RULES: Mapping[str, Callable[..., Decay]] = {"Constant": Constant, "Power": Power}
"""What ``spec.parse`` reads: Constant(decay=...), Power(sigma_rel=...) or Power(gamma=...)."""


class EMA:
    """A moving average of a module's trained parameters, Eq. (1); ``decay`` is a rule, or a number for ``Constant``.

    With a decay of 0 the parameters are their own average: nothing is kept beside them.
    """

    def __init__(self, module: nn.Module, decay: Decay | float) -> None:
        self.decay, self.count = _rule(decay), 0
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        averages = self.decay != Constant(0)
        self._kept = {name: p.detach().clone() for name, p in self.trained.items()} if averages else {}

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The averages by the parameters' names, no copy."""
        return self._kept or {name: p.detach() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        if self._kept:
            mine = [shards.own(self._kept[name]) for name in self.trained]
            decay = self.decay(self.count)
            torch._foreach_lerp_(mine, [shards.own(p) for p in self.trained.values()], 1 - decay)
        self.count += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the module's parameters are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def settle(self) -> None:
        """Let the parameters be the averages from here on."""
        for name, average in self._kept.items():
            self.trained[name].copy_(average)

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._kept.items():
            p = self.trained[name]
            held = p.clone()
            p.copy_(average)
            average.copy_(held)

    def state_dict(self) -> dict:
        return {"count": self.count, "shadow": self._kept}

    def load_state_dict(self, state: dict) -> None:
        """Averages that were none, of a decay of 0, are the parameters as they are now.

        Raises StateError where it is of other parameters.
        """
        require_entries(state, self.state_dict(), "the averages")
        saved = state["shadow"]
        if saved:
            require_entries(saved, self.shadow, "the averages' shadow")
        self.count = state["count"]
        for name, average in self._kept.items():
            shards.put(saved[name] if saved else self.trained[name].detach(), average)


def _rule(decay: Decay | float) -> Decay:
    if not isinstance(decay, float | int):
        return decay
    require_decay(decay)
    return Constant(decay)


class Settings(Protocol):
    """The settings of an optimisation, as every agent has them."""

    @property
    def lr(self) -> float:
        """The learning rate."""

    @property
    def weight_decay(self) -> float:
        """That of the optimiser."""

    @property
    def max_grad_norm(self) -> float:
        """The norm to which gradients are clipped."""

    @property
    def ema_decay(self) -> float:
        """Decay of the averaged weights; 0 for none."""

    @property
    def optimizer(self) -> str:
        """Its name, with settings in brackets."""

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""


class Optimization:
    """An optimiser with gradient clipping, a guard, and an EMA, over the trainable parameters of one module.

    Attributes:
        scheduler: of the learning rate; None while it is constant, and may be set (``optimizer.lr``).
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        ema: Decay | float = 0.0,
        optimizer: str = "adamw",
        warmup: int = 0,
    ) -> None:
        """``optimizer`` is a name of ``optimizers``; the learning rate rises to ``lr`` over ``warmup`` steps.

        Raises:
            ConfigError: no such optimiser, or it refuses the parameters.
        """
        self.module, self.max_grad_norm = module, max_grad_norm
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = NamedOptimizer(parse(optimizer), self.named, lr, weight_decay)
        self.ema, self.steps = EMA(module, ema), 0
        self.scheduler: LambdaLR | None = None
        if warmup:
            self.follow(rise(warmup))

    @classmethod
    def of(cls, module: nn.Module, settings: Settings) -> "Optimization":
        """As an agent's settings have it. Raises ConfigError as the constructor does."""
        s = settings
        return cls(module, s.lr, s.weight_decay, s.max_grad_norm, s.ema_decay, s.optimizer, s.warmup)

    def follow(self, factor: Factor, done: int = 0) -> None:
        """Let the learning rate of step n be ``factor(n)`` times that of the settings, from n = ``done`` on."""
        self.scheduler = LambdaLR(self.optimizer.inner, factor, done - 1)

    def step(self, share: float = 1.0) -> float:
        """Step on the accumulated gradients, those of all ranks, with that ``share`` of the learning rate, clear them,
        and return their norm before clipping.

        Raises:
            NumericalError: a gradient is not finite; nothing has been changed.
            RanksDiffer: the ranks' parameters are not the same any more.
        """
        current().reduce(self.named.values())
        norm = current().clip(self.named.values(), self.max_grad_norm)
        if norm != norm or norm == float("inf"):
            bad = [name for name, p in self.named.items() if p.grad is not None and not p.grad.isfinite().all()]
            self.clear()
            raise NumericalError(f"the gradient is not finite (norm {norm}) in {', '.join(bad[:5]) or 'its norm only'}")
        lr = self.optimizer.lr
        self.optimizer.lr = lr * share
        self.optimizer.step()
        self.optimizer.lr = lr
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.ema.update()
        self.steps += 1
        current().require_alike(self.named, self.steps)
        return norm

    def clear(self) -> None:
        """Forget what was accumulated for a step that is broken off."""
        current().forget()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict:
        return {
            "module": learned(self.module),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "scheduled": 0 if self.scheduler is None else self.scheduler.last_epoch,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises StateError where it is of another module or optimiser."""
        require_entries(state, self.state_dict(), "the optimisation")
        current().forget()
        restore(self.module, state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        if self.scheduler is not None:
            self.follow(self.scheduler.lr_lambdas[0], state["scheduled"])


def average(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each metric over a list of records of 0-dim tensors, with one device sync a metric."""
    return {name: torch.stack([m[name] for m in metrics]).mean().item() for name in metrics[0]}
