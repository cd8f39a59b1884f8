"""The bare passes of the networks within a call: recorded once, and run again with nothing between them.

A pass is one call of a module of the given classes with its inputs, and the part of the backward pass that it had:
none, that of its weights (and of its input, where that is on the way to others), or that of its input alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class Pass(NamedTuple):
    """One call: the module, its inputs, whether gradients are taken, and whether of the first input alone."""

    module: nn.Module
    inputs: tuple[Any, ...]
    graph: bool
    of_input: bool

    def __call__(self) -> None:
        """The pass again, forwards and, if it was, backwards."""
        x, *others = self.inputs
        x = x.detach().requires_grad_(x.requires_grad)
        with torch.set_grad_enabled(self.graph):
            y = self.module(x, *others)
            value = y if isinstance(y, Tensor) else y[0]
            if self.of_input:
                torch.autograd.grad(value.sum(), x)
            elif value.requires_grad:
                value.sum().backward()


@contextmanager
def recording(kinds: tuple[type[nn.Module], ...]) -> Iterator[list[Pass]]:
    """Within the context the passes of all modules of these classes are put down."""
    found: list[Pass] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, kinds):
            x, graph = inputs[0], torch.is_grad_enabled()
            of_input = graph and x.requires_grad and x.is_leaf
            held = x.detach().clone().requires_grad_(graph and x.requires_grad)
            found.append(Pass(module, (held, *inputs[1:]), graph, of_input))

    handle = register_module_forward_pre_hook(before)
    try:
        yield found
    finally:
        handle.remove()


class Floor:
    """The passes within ``call``, which is called once for it; a call of this runs them again."""

    def __init__(self, call: Callable[[], object], kinds: tuple[type[nn.Module], ...]) -> None:
        with recording(kinds) as self.passes:
            call()

    def __call__(self) -> None:
        for one in self.passes:
            one()
        for one in self.passes:
            one.module.zero_grad()
