"""The parts of a network that are computed, and where it is split gathered, one at a time: the layers of its lists."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in the lists of ``module``, the outermost ones, that have parameters."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _listed(child)
        else:
            yield from layers_of(child)


def largest(net: nn.Module) -> int:
    """The bytes of the largest part of a network that is gathered at once: of one layer, or of all that is in none."""
    inside = {p for part in layers_of(net) for p in part.parameters()}
    rest = [p for p in net.parameters() if p not in inside]
    return max(map(_bytes, [rest, *(list(part.parameters()) for part in layers_of(net))]))


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _listed(modules: nn.Module) -> Iterator[nn.Module]:
    for child in modules.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _listed(child)
        elif any(True for _ in child.parameters()):
            yield child


class _Together(torch.autograd.Function):
    """Its inputs, whose gradients then pass together."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def bounded(net: nn.Module) -> None:
    """Let the gradients of a network that is not split be added up as those of one that is: FSDP2 has what a part does
    with an input summed before it meets what others do with it. Where an input has three uses and more (as of a U-Net),
    another order has other last bits.
    """
    for part in [*layers_of(net), net]:
        part.register_forward_pre_hook(_bound, with_kwargs=True)


def _bound(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    found, form = tree_flatten((args, kwargs))
    at = [i for i, value in enumerate(found) if isinstance(value, Tensor) and value.requires_grad]
    if not at or not torch.is_grad_enabled():
        return None
    for i, value in zip(at, _Together.apply(*(found[i] for i in at))):
        found[i] = value
    return tree_unflatten(found, form)
