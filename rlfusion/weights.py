"""Tensors as bytes: one safetensors blob and its SHA-256, never a pickle.

Weights travel with the work that uses them as (version, sha256, blob), and the receiver checks all three; a name, shape
or dtype that does not fit is refused, so that no worker acts with other weights than it reports.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import safetensors.torch
import torch
from torch import Tensor, nn


class WeightsError(RuntimeError):
    """Weights that are not the ones announced, or do not fit the module."""


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """One safetensors blob of named tensors of any device; equal tensors give equal bytes."""
    return safetensors.torch.save({name: _own(tensor) for name, tensor in tensors.items()})


def unpack(blob: bytes) -> dict[str, Tensor]:
    """The named tensors of a blob, each in memory of its own, on the CPU.

    Raises:
        safetensors.SafetensorError: the bytes are no such blob.
    """
    return {name: _own(tensor) for name, tensor in safetensors.torch.load(blob).items()}


def _own(tensor: Tensor) -> Tensor:
    """A contiguous, aligned copy on the CPU that shares memory with nothing."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def sha256(blob: bytes) -> str:
    """The hexadecimal SHA-256 of a blob."""
    return hashlib.sha256(blob).hexdigest()


@dataclass(frozen=True)
class Weights:
    """The weights of a module after ``version`` updates: a safetensors blob and its SHA-256."""

    version: int
    sha256: str
    blob: bytes

    @classmethod
    def of(cls, module: nn.Module, version: int) -> Self:
        """A copy of the module's parameters and buffers as they are now."""
        blob = pack(module.state_dict())
        return cls(version, sha256(blob), blob)

    def load_into(self, module: nn.Module) -> None:
        """Copy the weights into ``module``, whose names, shapes and dtypes must be exactly theirs.

        Raises:
            WeightsError: the blob's SHA-256 is not the announced one, or a tensor does not fit; nothing is changed.
        """
        found = sha256(self.blob)
        if found != self.sha256:
            raise WeightsError(f"weights of version {self.version}: SHA-256 {found}, expected {self.sha256}")
        ours, theirs = module.state_dict(), unpack(self.blob)
        wrong = [_misfit(name, ours.get(name), theirs.get(name)) for name in sorted(ours.keys() | theirs.keys())]
        wrong = [text for text in wrong if text]
        if wrong:
            raise WeightsError(f"weights of version {self.version} do not fit the module: {'; '.join(wrong[:5])}")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(theirs[name])


def _misfit(name: str, ours: Tensor | None, theirs: Tensor | None) -> str:
    if ours is None or theirs is None:
        return f"{name} is {'not in the module' if ours is None else 'missing'}"
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return f"{name} is {theirs.dtype} {tuple(theirs.shape)}, expected {ours.dtype} {tuple(ours.shape)}"
    return ""
