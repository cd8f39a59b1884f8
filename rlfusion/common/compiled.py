"""Calls of a network by torch.compile, in place: its parameters, their names and its copies stay what they are.

Each shape of a call is compiled by itself, with and without a graph, whatever was called before: the code of a call,
and so its bits, do not depend on a run's history, and a run that is resumed has those of one that never stopped. torch
would otherwise give one code to several shapes from the second on, and none to the ninth.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

BACKEND = "inductor"
SHAPES = 512
"""Codes that one process compiles at most; another would be an error, not an uncompiled call."""


def compile_calls(net: nn.Module) -> None:
    """Let calls of ``net`` be compiled from here on; each shape is at its first call."""
    from torch._dynamo import config

    config.cache_size_limit = config.accumulated_cache_size_limit = SHAPES  # the names of torch 2.6, which last
    config.fail_on_cache_limit_hit = True
    net.compile(backend=BACKEND, dynamic=False)


def compiled(module: nn.Module) -> list[nn.Module]:
    """The modules in it whose calls are compiled."""
    return [m for m in module.modules() if m._compiled_call_impl is not None]


def follow(copy: nn.Module, module: nn.Module) -> None:
    """Compile in a copy what is compiled in ``module``: ``copy.deepcopy`` leaves it out."""
    for one, other in zip(copy.modules(), module.modules(), strict=True):
        if other._compiled_call_impl is not None:
            compile_calls(one)


@contextmanager
def plain(module: nn.Module) -> Iterator[None]:
    """Within the context nothing in ``module`` is compiled: for shapes that come seldom, whose compiling takes longer
    than their calls.
    """
    held = [(m, m._compiled_call_impl) for m in compiled(module)]
    for m, _ in held:
        m._compiled_call_impl = None
    try:
        yield
    finally:
        for m, call in held:
            m._compiled_call_impl = call
