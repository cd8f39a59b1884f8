"""Modules without memory for their parameters, and the rows of each parameter in files: for networks that are split.

A network that is split over ranks is built on the meta device, and each rank reads its own rows (``shards.split``), so
that none has all of them at any time. What a module holds beside its parameters (buffers) is built as ever.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError

Rows = Callable[[slice], Tensor]
"""Some neighbouring rows of a tensor, in memory of their own on the CPU."""
Filling = dict[nn.Parameter, Rows]
"""Where the rows of parameters on the meta device are."""


class Misfit(ValueError):
    """Files whose tensors are not those of a module."""


@contextmanager
def parameters() -> Iterator[None]:
    """Within the context the parameters of modules that are made have no memory: they are on the meta device."""
    register = nn.Module.register_parameter

    def hollow(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        if p is not None and not p.is_meta:
            p = nn.Parameter(p.detach().to("meta"), p.requires_grad)
        register(module, name, p)

    nn.Module.register_parameter = hollow  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def is_hollow(module: nn.Module) -> bool:
    """Whether a module has a parameter without memory."""
    return any(p.is_meta for p in module.parameters())


def require_buffers(module: nn.Module, what: str) -> None:
    """Refuse a module that was made within ``parameters``, and makes a buffer where its parameters are.

    Raises:
        ConfigError: names the buffer.
    """
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise ConfigError(
                f"learner.shard = fsdp: {what} makes its buffer {name!r} of its parameters, or on their device, as it "
                "is built; expected one that is made without them, or learner.shard = none"
            )


@contextmanager
def standing_in(module: nn.Module) -> Iterator[None]:
    """Within the context the parameters without memory seem to be on the CPU, where all their elements are one: for
    what is put beside them, and follows their device and dtype.
    """
    stand: dict[nn.Parameter, nn.Parameter] = {}
    for p in module.parameters():
        if p.is_meta:
            stand[p] = nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), p.requires_grad)
    _exchange(module, stand)
    try:
        yield
    finally:
        for p, other in stand.items():
            p.requires_grad_(other.requires_grad)
        _exchange(module, {other: p for p, other in stand.items()})


def _exchange(module: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and p in new:
                part._parameters[name] = new[p]


class Files:
    """The tensors of some safetensors files by name, of which rows are read."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """``files``: the file of each tensor.

        Raises:
            OSError, safetensors.SafetensorError: one cannot be read.
        """
        self.files = dict(files)
        self._open = {file: safe_open(file, "pt") for file in sorted(set(self.files.values()))}

    @classmethod
    def of(cls, file: Path) -> "Files":
        """Those of one file."""
        with safe_open(file, "pt") as held:
            return cls(dict.fromkeys(held.keys(), file))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._slices(name).get_shape())

    def whole(self, name: str) -> Tensor:
        """All of a tensor, in memory of its own."""
        return self._open[self.files[name]].get_tensor(name).clone()

    def rows(self, name: str, dtype: torch.dtype) -> Rows:
        """The rows of a tensor of one dimension at least, as ``dtype``."""
        return lambda rows: self._slices(name)[rows].to(dtype, copy=True)

    def _slices(self, name: str) -> Any:
        return self._open[self.files[name]].get_slice(name)


def filling(module: nn.Module, files: Files, names: Mapping[str, str]) -> Filling:
    """Where the rows of the parameters of ``module`` are that have no memory; its buffers that are saved are read.

    Args:
        names: the name in ``files`` of each entry of the module's state.

    Raises:
        Misfit: a tensor is missing, of another shape, or of no entry of the module.
    """
    found: Filling = {}
    if over := sorted(files.files.keys() - names.values()):
        raise Misfit(f"{over[0]!r} is in the file, and not in the model")
    for name, ours in module.state_dict(keep_vars=True).items():
        at = names[name]
        if at not in files.files:
            raise Misfit(f"{at!r} is missing")
        if files.shape(at) != tuple(ours.shape):
            raise Misfit(f"{at!r} is of shape {files.shape(at)}, expected {tuple(ours.shape)}")
        if isinstance(ours, nn.Parameter):
            found[ours] = files.rows(at, ours.dtype)
        else:
            ours.copy_(files.whole(at))
    return found
