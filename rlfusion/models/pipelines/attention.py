"""Which code computes the attention of a pipeline's network: a back end of diffusers' dispatcher, by its name there.

A back end is tried before it is taken, on the device and in the dtype that it will have, with its gradient: that a
package is installed does not say that it works here, and some that compute attention have no backward pass.
"""

from typing import Any

import torch
from torch import nn

from rlfusion.common.errors import ConfigError, shorten, unknown
from rlfusion.models.pipelines import hub

NATIVE = "native"
"""torch's own attention, with a kernel of torch's choice: what all networks of diffusers call unless told otherwise."""
FETCHED, COMPILED = "_hub", "flex"
"""Back ends that come from the hub at their first use, and one that is compiled then: a list does not try them."""
TRIED = (1, 16, 1, 64)
"""Batch, tokens, heads and width of the attention that is tried."""
REFUSALS = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError, OSError)
"""What a back end raises that is not there or does not do this."""


def choose(model: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """Let the attention of ``model`` be computed by the back end of this name.

    Raises:
        ConfigError: diffusers has no such back end, it does not work here, or the network's attention takes none.
    """
    dispatch: Any = hub.diffusers().models.attention_dispatch
    known = [one.value for one in dispatch.AttentionBackendName]
    if name not in known:
        raise unknown("pipeline.attention", name, working(dispatch, device, dtype))
    taking = [m for m in model.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]
    if not taking:
        if name == NATIVE:
            return
        raise ConfigError(
            f"pipeline.attention = {name}: the attention of {type(model).__name__} is not dispatched by diffusers, "
            f"expected {NATIVE}"
        )
    if said := fault(dispatch, name, device, dtype):
        raise ConfigError(
            f"pipeline.attention = {name}: does not work here ({said}); expected one of "
            f"{', '.join(working(dispatch, device, dtype))}"
        )
    with dispatch.attention_backend(name):  # after which the default of the process is what it was
        model.set_attention_backend(name)  # type: ignore[operator]


def working(dispatch: Any, device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """The back ends that work here."""
    names = [one.value for one in dispatch.AttentionBackendName]
    tried = [name for name in names if not name.endswith(FETCHED) and name != COMPILED]
    return [name for name in tried if not fault(dispatch, name, device, dtype)]


def fault(dispatch: Any, name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Why a back end does not compute attention and its gradient here; "" where it does."""
    q, k, v = (torch.full(TRIED, 0.1, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with dispatch.attention_backend(name), torch.enable_grad():
            y = dispatch.dispatch_attention_fn(q, k, v)
            if not y.requires_grad:
                return "it has no gradient"
            y.float().sum().backward()
    except REFUSALS as error:
        return shorten(error, 120)
    return "" if all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v)) else "it has no gradient"
