"""Small parameters stepped as one: where tensors are small, the calls of a step take longer than their arithmetic.

What AdamW does to an element depends on that element alone. So the bits are those of the parameters one by one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 2**15
"""Elements up to which a parameter is packed; larger ones take longer than their call."""


class Packed:
    """The small parameters of an optimiser's last group, laid end to end in one that stands for them in its steps.

    In a step are those that have a gradient, if all of them have had as many steps; where not, each is by itself.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.members = inner, list[nn.Parameter]()
        parameters = inner.param_groups[-1]["params"]
        self.small = [p for p in parameters if _fits(p, parameters[0])]
        self.flat = nn.Parameter(torch.empty(0))
        self.places: dict[nn.Parameter, slice] = {}
        self.own, self.of_flat = list[Tensor](), list[Tensor]()  # a member's part of it and of its gradient
        self.states: dict[nn.Parameter, dict[str, Any]] = {}  # and of its state, once asked for

    def step(self) -> None:
        """One step on the gradients that are there."""
        wanted = [p for p in self.small if p.grad is not None]
        if len(wanted) != len(self.members) or any(p is not q for p, q in zip(wanted, self.members)):
            self.unpack()
            self._pack(wanted)
        if not self.members:
            self.inner.step()
            return
        held: list[Tensor] = [*self.members]
        with torch.no_grad():
            torch._foreach_copy_(self.of_flat, [p.grad for p in self.members if p.grad is not None])
            torch._foreach_copy_(self.own, held)
        with self._standing_in():
            self.inner.step()
        with torch.no_grad():
            torch._foreach_copy_(held, self.own)

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Within the context the optimiser has the flat parameter in the place of those that are in it."""
        group = self.inner.param_groups[-1]
        held = group["params"]
        group["params"] = [self.flat, *(p for p in held if p not in self.places)]
        try:
            yield
        finally:
            group["params"] = held

    def state_of(self, p: nn.Parameter) -> Mapping[str, Any]:
        """The state of a parameter, no copy; empty before its first step. The count of steps is that of all, which who
        loads it has to copy.
        """
        if p not in self.places:
            return self.inner.state.get(p, {})
        if not self.states and (whole := self.inner.state.get(self.flat)):
            self.states = {
                q: {name: v[at].view_as(q) if v.ndim else v for name, v in whole.items()}
                for q, at in self.places.items()
            }
        return self.states.get(p, {})

    def unpack(self) -> None:
        """Let each parameter be by itself again, with its state."""
        for p in self.members:
            self.inner.state[p] = {name: v.clone() for name, v in self.state_of(p).items()}
        self.forget()

    def forget(self) -> None:
        """Let none be packed; the state of those that were is dropped."""
        self.inner.state.pop(self.flat, None)
        self.members, self.places, self.states = [], {}, {}

    def _pack(self, wanted: list[nn.Parameter]) -> None:
        """Lay these parameters end to end, with their states; not those that have one memory, which each steps."""
        states = [self.inner.state.get(p, {}) for p in wanted]
        if len(wanted) < 2 or len({(bool(state), float(state.get("step", 0.0))) for state in states}) > 1:
            return
        if len({p.data_ptr() for p in wanted}) < len(wanted):
            return
        self.members = wanted
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in wanted]))
        self.flat.grad = torch.empty_like(self.flat)
        ends = torch.tensor([p.numel() for p in wanted]).cumsum(0).tolist()
        self.places = {p: slice(end - p.numel(), end) for p, end in zip(wanted, ends)}
        self.own = [self.flat.data[at].view_as(p) for p, at in self.places.items()]
        self.of_flat = [self.flat.grad[at].view_as(p) for p, at in self.places.items()]
        if states[0]:
            joined = {name: [state[name] for state in states] for name in states[0]}
            self.inner.state[self.flat] = {
                name: torch.cat([v.flatten() for v in values]) if values[0].ndim else values[0].clone()
                for name, values in joined.items()
            }
        for p in wanted:
            self.inner.state.pop(p, None)


def _fits(p: nn.Parameter, first: nn.Parameter) -> bool:
    """Whether a parameter is packed, if it has a gradient."""
    return 0 < p.numel() <= SMALL and p.ndim > 0 and p.dtype == first.dtype and p.is_contiguous()
