"""Modules whose parameters lie in files without a name instead of memory: for whole networks that are soon split.

Initial weights are drawn for a whole network, by code that may do anything with its parameters. A rank that keeps 1 / N
of them lets them be drawn into such files, whose pages the system writes out when it wants the memory, and copies its
own rows (``shards.split``). The bits are those of a network in memory. The files are in the folder for temporary ones
(``TMPDIR``), and are gone when the last tensor in them is, or the process.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlfusion.common.errors import StorageError
from rlfusion.common.hollow import Filling
from rlfusion.common.shards import is_split

AT_ONCE = 2**24
"""Bytes that ``fill`` reads at a time, about."""


@contextmanager
def parameters(wanted: bool = True) -> Iterator[None]:
    """Within the context the parameters of modules that are made are in files; where that is ``wanted``."""
    register = nn.Module.register_parameter
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def filed(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        if p is not None and id(p) not in made and p.device.type == "cpu" and p.numel() and not is_split(p):
            new = nn.Parameter(_in_file(p.detach()), p.requires_grad)
            made[id(p)] = made[id(new)] = p, new  # either of which may be given to a second module
        register(module, name, p if p is None or id(p) not in made else made[id(p)][1])

    if wanted:
        nn.Module.register_parameter = filed  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(module: nn.Module, filling: Filling) -> None:
    """Give the parameters of ``module`` that have no memory their values, in files."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and p.is_meta:
                if p not in made:
                    made[p] = nn.Parameter(_filled(p, filling), p.requires_grad)
                part._parameters[name] = made[p]


def _filled(p: nn.Parameter, filling: Filling) -> Tensor:
    if not p.ndim or not p.numel():
        return filling[p](slice(0, 0)) if p.ndim else torch.zeros((), dtype=p.dtype)  # which ``split`` refuses
    new = _empty(p.shape, p.dtype)
    each = max(1, AT_ONCE * len(p) // max(1, p.numel() * p.element_size()))
    for at in range(0, len(p), each):
        rows = slice(at, min(at + each, len(p)))
        new[rows] = filling[p](rows)
    return new


def _in_file(value: Tensor) -> Tensor:
    return _empty(value.shape, value.dtype).copy_(value)


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Raises StorageError where there is no room for it."""
    size = shape.numel() * dtype.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # what is not reserved would be a SIGBUS when it is written
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        cause = f"{error.strerror}, for {size} bytes of a network that is to be split; set TMPDIR to a roomier folder"
        raise StorageError(error.errno, cause, tempfile.gettempdir()) from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)
