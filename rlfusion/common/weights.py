"""Tensors as bytes: one safetensors blob and its SHA-256, never a pickle.

Weights travel with the work that uses them as (version, sha256, blob), and the receiver checks all three; a name, shape
or dtype that does not fit is refused, so that no worker acts with other weights than it reports.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from rlfusion.common import row_files, shards
from rlfusion.common.errors import StateError

NONE: Mapping[str, type] = {}
ADAPTER = ".lora_"
"""What the names of adapters' parameters have in them, and no others."""


class WeightsError(StateError):
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


def read_file(file: Path) -> bytes:
    """The content of a file; what is none (a folder, a device, a pipe that nobody fills) raises OSError."""
    if file.exists() and not file.is_file():
        raise OSError(f"{file.name} is no file")
    return file.read_bytes()


def sha256(blob: bytes) -> str:
    """The hexadecimal SHA-256 of a blob."""
    return hashlib.sha256(blob).hexdigest()


def learned(module: nn.Module) -> dict[str, Tensor]:
    """What training can change of a module, itself and no copy: its adapters (``lora``) where it has any, else its
    whole state.
    """
    state = module.state_dict()
    return {name: tensor for name, tensor in state.items() if ADAPTER in name} or state


def restore(module: nn.Module, tensors: Mapping[str, Tensor], what: str = "the state") -> None:
    """Copy ``tensors`` into what ``learned`` gives of the module: names, shapes and dtypes must be exactly its.

    Raises:
        WeightsError: a tensor does not fit; nothing is changed.
    """
    _fill(learned(module), tensors, what)


def _fill(ours: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    if not isinstance(tensors, Mapping):
        raise WeightsError(f"{what} is {type(tensors).__name__}, expected tensors by name")
    names = sorted(ours.keys() | tensors.keys(), key=str)
    wrong = [_misfit(name, ours.get(name), tensors.get(name)) for name in names]
    wrong = [text for text in wrong if text]
    if wrong:
        raise WeightsError(f"{what} does not fit the module: {'; '.join(wrong[:5])}")
    for name, tensor in ours.items():
        shards.put(tensors[name], tensor)


def require_entries(state: Any, ours: Mapping[Any, Any], what: str, optional: Mapping[str, type] = NONE) -> None:
    """Refuse a saved ``state`` that has other entries than ``ours``, of which it shall take the place.

    The names must be the same, tensors of the same shape and dtype, other values of the same type (for a float also a
    whole number). What lies deeper is for the loader of each entry to check. Entries that are ``optional`` may be None
    on either side, or of the type that is given.

    Raises:
        StateError: names the first entry that does not fit.
    """
    if not isinstance(state, Mapping):
        raise StateError(
            f"{what} is {type(state).__name__}, expected a dict of {', '.join(map(str, ours)) or 'nothing'}"
        )
    for name in sorted(ours.keys() | state.keys(), key=str):
        if name not in ours:
            raise StateError(f"{what} has {name!r}, which is not expected here")
        if name not in state:
            raise StateError(f"{what} has no {name!r}")
        mine, theirs = ours[name], state[name]
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            if message := _misfit(repr(name), mine, theirs):
                raise StateError(f"{what}: {message}")
            continue
        expected = optional.get(name, type(mine))
        if (theirs is None and name in optional) or (mine is None and name not in optional):
            continue  # of what is None here nothing more is known
        if not _is(theirs, expected):
            raise StateError(f"{what}: {name!r} is {type(theirs).__name__}, expected {expected.__name__}")


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of the type of another one: mappings are one type, a whole number is a float."""
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    return type(value) is kind or (kind is float and type(value) is int)


@dataclass(frozen=True)
class Weights:
    """The learned tensors of a module after ``version`` updates: a safetensors blob and its SHA-256. Of a network that
    is split over the ranks, this rank's rows of them, or (``whole``) all, or the manifest of ``row_files``.
    """

    version: int
    sha256: str
    blob: bytes

    @classmethod
    def of(cls, module: nn.Module, version: int) -> Self:
        """A copy of what is ``learned`` of the module as it is now."""
        return cls.packed(version, {name: shards.own(tensor) for name, tensor in learned(module).items()})

    @classmethod
    def whole(cls, module: nn.Module, version: int, here: bool) -> Self:
        """The same of all ranks' rows, which they ask for together; nothing where it is not wanted ``here``."""
        gathered = {}
        for name, tensor in learned(module).items():
            full = shards.whole(tensor)
            if here:
                gathered[name] = full.cpu()
        return cls.packed(version, gathered)

    @classmethod
    def packed(cls, version: int, tensors: Mapping[str, Tensor]) -> Self:
        """These tensors."""
        blob = pack(tensors)
        return cls(version, sha256(blob), blob)

    @classmethod
    def manifest(cls, version: int, blob: bytes) -> Self:
        """Those of which ``blob`` is the manifest."""
        return cls(version, sha256(blob), blob)

    @cached_property
    def mark(self) -> object:
        """By which weights that are loaded already are known again."""
        return self.sha256

    def load_into(self, module: nn.Module) -> None:
        """Copy the weights into ``module``, as ``restore``.

        Raises:
            WeightsError: the blob's SHA-256 is not the announced one, or a tensor does not fit; nothing is changed, but
                where the blob is a manifest and one of its files is the cause.
        """
        found = sha256(self.blob)
        if found != self.sha256:
            raise WeightsError(f"weights of version {self.version}: SHA-256 {found}, expected {self.sha256}")
        ours = {name: shards.own(tensor) for name, tensor in learned(module).items()}
        if row_files.is_manifest(self.blob):
            try:
                row_files.fill(self.blob, self.version, ours)
            except row_files.Unreadable as error:
                raise WeightsError(f"weights of version {self.version}: {error}") from error
            return
        _fill(ours, unpack(self.blob), f"the blob of weights of version {self.version}")


class Live(Weights):
    """The weights that a module of this process has when they are taken: they are copied, and neither packed nor
    hashed unless that is asked for. Who gives them out sees to it that the module does not change before.
    """

    def __init__(self, module: nn.Module, version: int) -> None:
        object.__setattr__(self, "version", version)
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "mark", object())

    @cached_property
    def blob(self) -> bytes:  # type: ignore[override]
        """As of ``Weights``, at the first use."""
        return Weights.of(self.module, self.version).blob

    @cached_property
    def sha256(self) -> str:  # type: ignore[override]
        """As of ``Weights``, at the first use."""
        return sha256(self.blob)

    def load_into(self, module: nn.Module) -> None:
        """Copy the weights into ``module``, as ``restore``; it has them where it is the very one."""
        if module is self.module:
            return
        restore(module, learned(self.module), f"the weights of version {self.version}")


def _misfit(name: str, ours: Tensor | None, theirs: Any) -> str:
    if ours is None or theirs is None:
        return f"{name} is {'not in the module' if ours is None else 'missing'}"
    if not isinstance(theirs, Tensor):
        return f"{name} is {type(theirs).__name__}, expected {ours.dtype} {tuple(ours.shape)}"
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return f"{name} is {theirs.dtype} {tuple(theirs.shape)}, expected {ours.dtype} {tuple(ours.shape)}"
    return ""
