"""An optimiser that keeps its state by the names of the parameters."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common import shards
from rlfusion.common.errors import StateError
from rlfusion.common.weights import require_entries
from rlfusion.training.optimizers.packed import Packed
from rlfusion.training.optimizers.recipe import Recipe


class NamedOptimizer:
    """An optimiser of named parameters. One without a gradient is left as it is, and has no state until it has one."""

    def __init__(self, recipe: Recipe, named: Mapping[str, nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        """Raises ConfigError as ``Recipe.build``."""
        self.recipe, self.named, self.weight_decay = recipe, dict(named), weight_decay
        parameters = list(self.named.values())
        self.inner = recipe.build(parameters, lr, weight_decay)
        listed = recipe.chooses and self.inner.param_groups[-1]["foreach"]
        self._packed = Packed(self.inner) if listed else None
        self._start = copy.deepcopy(_settings(self.inner))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of it is made of: each parameter by itself, as what is packed is views of one memory."""
        if self._packed:
            self._packed.unpack()
        return self.__dict__.copy()

    @property
    def lr(self) -> float:
        """The learning rate; it may be set between steps."""
        return self.inner.param_groups[0]["lr"]

    @lr.setter
    def lr(self, lr: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr

    def step(self) -> None:
        """One step on the gradients that are there."""
        for p in (p for group in self.inner.param_groups if group.get("fused") for p in group["params"]):
            if p.grad is None or p.grad.layout is not torch.strided:
                continue
            if p.grad.stride() != p.stride():  # a fused step goes through both as they lie
                p.grad = torch.empty_like(p).copy_(p.grad)
        with self.recipe.running():
            (self._packed or self.inner).step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        if self.recipe.foreign:  # its own way of it may be another
            self.inner.zero_grad()
            return
        for p in self.named.values():
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The state by the parameters' names, no copy; and what the optimiser has changed of its groups' settings. The
        learning rate is not in it: it is of the settings and of its course.
        """
        state_of = self._packed.state_of if self._packed else self.inner.state.get
        held = {name: state_of(p) for name, p in self.named.items()}
        groups = [
            {key: value for key, value in now.items() if key not in before or not _same(value, before[key])}
            for now, before in zip(_settings(self.inner), self._start)
        ]
        return {
            "kind": self.recipe.kind.__qualname__,
            "groups": groups,
            "state": {name: dict(state) for name, state in held.items() if state},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError where it is of other parameters, or of another optimiser."""
        require_entries(state, self.state_dict(), "the optimiser")
        kind = self.recipe.kind.__qualname__
        if state["kind"] != kind:
            raise StateError(f"the optimiser is of the kind {state['kind']!r}, expected {kind!r}")
        plain = self.recipe.kind is torch.optim.AdamW and state["groups"] and not any(state["groups"])
        if len(state["groups"]) != len(self._start) and not plain:  # its ways differ in their groups alone
            raise StateError(f"the optimiser has {len(state['groups'])} groups, expected {len(self._start)}")
        loaded = {name: self._fitted(name, held) for name, held in state["state"].items()}
        self._load_groups(state["groups"])
        if self._packed:
            self._packed.forget()
        self.inner.state.clear()
        for name, held in loaded.items():
            self.inner.state[self.named[name]] = held

    def _fitted(self, name: str, held: Any) -> dict[str, Any]:
        """The saved state of a parameter, on the devices where it belongs."""
        if name not in self.named:
            raise StateError(f"the optimiser has moments of {name!r}, which is not trained here")
        like: dict[str, Any] = next(iter(self.recipe.stepped(self.named[name]).state.values()), {})
        require_entries(held, like, f"moments of {name!r}")
        return {k: _owned(shards.like(v, like[k]), like[k]) if isinstance(v, Tensor) else v for k, v in held.items()}

    def _load_groups(self, saved: list[Any]) -> None:
        new = _settings(self.recipe.stepped(next(iter(self.named.values())))) if any(saved) else []
        for group, start, given, like in zip(self.inner.param_groups, self._start, saved, new or self._start):
            keys = given if isinstance(given, Mapping) else ()
            require_entries(given, {k: like[k] for k in keys if k in like}, "one of the optimiser's groups")
            group.update(copy.deepcopy(start) | given)


def _owned(held: Tensor, like: Tensor) -> Tensor:
    """A tensor of a state on the device of ``like``, in memory as that is. A number, such as the count of steps, is
    copied: parameters that were stepped as one have one, and each that has its own counts on by itself.
    """
    if held.stride() != like.stride():
        return torch.empty_like(like, dtype=held.dtype).copy_(held)
    return held.to(like.device, copy=not held.ndim)


def state_bytes(recipe: Recipe, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes that the optimiser holds of ``parameters`` once each had a gradient; single numbers are not counted."""
    sizes: dict[Any, int] = {}
    for p in parameters:
        key = (p.shape, p.dtype, p.device)
        if key not in sizes:
            held = [v for state in recipe.stepped(p).state.values() for v in state.values()]
            tensors = [v for v in held if isinstance(v, Tensor) and v.dim()]
            sizes[key] = sum(v.numel() * v.element_size() for v in tensors)
    return sum(sizes[p.shape, p.dtype, p.device] for p in parameters)


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What its groups hold beside the parameters and the learning rate."""
    beside = ("params", "param_names", "lr", "initial_lr")
    return [{k: v for k, v in group.items() if k not in beside} for group in optimizer.param_groups]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
