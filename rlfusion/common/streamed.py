"""Files of safetensors that are written tensor by tensor, so that never more than one is there at a time.

    file = length of the header (u64), header (JSON, padded to 8 bytes), the tensors' bytes

The bytes are those of ``safetensors.torch.save``.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.common import storage

KINDS = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of dtypes, in the order in which it has their tensors."""
CHUNK = 2**24
"""Bytes that are written at a time."""


class Part(NamedTuple):
    """A tensor that is to be written: of which dtype and shape it is, and how it is made."""

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.shape.numel() * self.dtype.itemsize


def part(tensor: Tensor, make: Callable[[], Tensor] | None = None) -> Part:
    """That of a tensor, which ``make`` makes (itself, by default)."""
    return Part(tensor.dtype, tensor.shape, make or (lambda: tensor.detach()))


def order(parts: Mapping[str, Part]) -> list[str]:
    """The names in the order in which the file has them."""
    rank = {dtype: i for i, dtype in enumerate(KINDS)}
    return sorted(parts, key=lambda name: (rank[parts[name].dtype], name))


def header(parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands before the tensors' bytes."""
    held: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in order(parts):
        dtype, shape, _ = one = parts[name]
        held[name] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [begin, begin + one.size]}
        begin += one.size
    text = json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None, anyway: bool = False
) -> str:
    """Write a file as ``storage.stream`` does. Where nothing is written the tensors are made nonetheless, one by one
    and in the same order: others may take part in making them.

    Returns:
        the SHA-256 of the file.

    Raises:
        StorageError: it cannot be written.
    """
    known = hashlib.sha256()

    def seen() -> Iterator[memoryview]:
        for some in _content(parts, metadata):
            known.update(some)
            yield some

    storage.stream(path, seen(), anyway)
    return known.hexdigest()


def digest(parts: Mapping[str, Part]) -> str:
    """The SHA-256 of a file that is not written; the tensors are made one by one, in the order of the file."""
    known = hashlib.sha256()
    for some in _content(parts):
        known.update(some)
    return known.hexdigest()


def _content(parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    yield memoryview(header(parts, metadata))
    for name in order(parts):
        yield from _bytes(parts[name].make())


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, some at a time."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for some in flat.split(CHUNK):
        yield memoryview(some.numpy())
