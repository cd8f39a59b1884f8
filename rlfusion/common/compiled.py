"""Calls of a network by torch.compile or CUDA graphs, in place: parameters, their names and copies stay what they are.

Each shape of a call is compiled by itself, with and without a graph, whatever was called before: the code of a call,
and so its bits, do not depend on a run's history, and a run that is resumed has those of one that never stopped. torch
would otherwise give one code to several shapes from the second on, and none to the ninth.

With "graphs" nothing is compiled: calls without gradients are replayed (``replayed``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.replayed import Replayed

BACKEND = "inductor"
Compile = bool | Literal["graphs"]
"""What becomes of a network's calls: they are compiled, or those without gradients replayed, or nothing."""
SHAPES = 512
"""Codes that one process compiles at most; another would be an error, not an uncompiled call."""


def compile_calls(net: nn.Module, how: Compile = True) -> None:
    """Let calls of ``net`` be compiled or replayed from here on; each shape is at its first call.

    Raises:
        ConfigError: ``how`` is neither.
    """
    if how == "graphs":
        net._compiled_call_impl = Replayed(net)
        return
    if how is not True:
        raise ConfigError(f"compile = {how!r}: expected true, false or graphs")
    from torch._dynamo import config

    config.cache_size_limit = config.accumulated_cache_size_limit = SHAPES  # the names of torch 2.6, which last
    config.fail_on_cache_limit_hit = True
    net.compile(backend=BACKEND, dynamic=False)


def compiled(module: nn.Module) -> list[nn.Module]:
    """The modules in it whose calls are compiled or replayed."""
    return [m for m in module.modules() if m._compiled_call_impl is not None]


def follow(copy: nn.Module, module: nn.Module) -> None:
    """Compile, or replay, in a copy what is so in ``module``: ``copy.deepcopy`` leaves it out."""
    for one, other in zip(copy.modules(), module.modules(), strict=True):
        if other._compiled_call_impl is not None:
            compile_calls(one, "graphs" if isinstance(other._compiled_call_impl, Replayed) else True)


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
