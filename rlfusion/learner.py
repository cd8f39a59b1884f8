"""What every learner is, and the one place where an optimiser steps.

A learner owns weights and an optimiser: ``update(batch) -> metrics``. Reward fine-tuning, pretraining and distillation
differ only in what yields the batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from rlfusion.errors import ConfigError, NumericalError

Batch = TypeVar("Batch", contravariant=True)


class Learner(Protocol[Batch]):
    """``update`` makes the optimiser steps of one batch; the state dicts hold all that resuming needs."""

    def update(self, batch: Batch) -> dict[str, float]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class EMA:
    """An exponential moving average of a module's parameters: shadow <- decay shadow + (1 - decay) parameter.

    The decay is warmed up as min(decay, (1 + n) / (10 + n)) after n steps, so that early averages forget the start.
    decay = 0 keeps a copy of the parameters.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema_decay = {decay}: expected 0 <= ema_decay < 1")
        self.module, self.decay, self.count = module, decay, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, p in self.module.named_parameters():
            self.shadow[name].lerp_(p, 1 - decay)
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
    def _swap(self) -> None:
        for name, p in self.module.named_parameters():
            held = p.clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(held)

    def state_dict(self) -> dict:
        return {"count": self.count, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


class Optimization:
    """AdamW with gradient clipping, a guard, and an EMA, over the trainable parameters of one module."""

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        ema_decay: float = 0.0,
    ) -> None:
        self.module, self.max_grad_norm = module, max_grad_norm
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=lr, weight_decay=weight_decay)
        self.ema = EMA(module, ema_decay)

    def step(self) -> float:
        """Step on the accumulated gradients, clear them, and return their norm before clipping.

        Raises:
            NumericalError: a gradient is not finite; nothing has been changed.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm).item()
        if norm != norm or norm == float("inf"):
            bad = [name for name, p in self.named.items() if p.grad is not None and not p.grad.isfinite().all()]
            self.optimizer.zero_grad()
            raise NumericalError(f"the gradient is not finite (norm {norm}) in {', '.join(bad[:5]) or 'its norm only'}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return norm

    def state_dict(self) -> dict:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])


def average(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each metric over a list of records of 0-dim tensors, with one device sync a metric."""
    return {name: torch.stack([m[name] for m in metrics]).mean().item() for name in metrics[0]}
