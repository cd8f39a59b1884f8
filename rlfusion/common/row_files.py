"""Weights of a network that is split, for processes that have all of it: a file of each rank's rows, in a folder that
all share, and the manifest by which they travel.

    version-<v>.rows-<r>-of-<n>.safetensors    the rows of rank r of n; the first rank's has what is not split, too

The manifest (run, version, the SHA-256 of each file) is what is passed on and hashed in place of the weights.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rlfusion.common import shards, storage, streamed

FORMAT = "rlfusion-weights-1"
_BEGIN = json.dumps({"format": FORMAT})[:-1].encode()


class Unreadable(ValueError):
    """Files of rows that are not there, not the announced ones, or not of the tensors that they shall fill."""


class Manifest(NamedTuple):
    """What is said of the files of a version of the weights of a run."""

    run: str
    version: int
    folder: str
    sha256: tuple[str, ...]
    """Of the file of each rank."""

    @property
    def files(self) -> list[Path]:
        """The file of each rank."""
        count = len(self.sha256)
        return [Path(self.folder) / name_of(self.version, rank, count) for rank in range(count)]

    def packed(self) -> bytes:
        """As bytes."""
        return json.dumps({"format": FORMAT, **self._asdict()}).encode()

    @classmethod
    def unpacked(cls, blob: bytes) -> "Manifest":
        """From ``packed``."""
        held = json.loads(blob)
        return cls(held["run"], held["version"], held["folder"], tuple(held["sha256"]))


def is_manifest(blob: bytes) -> bool:
    """Whether these bytes are a manifest, and not the weights themselves."""
    return blob.startswith(_BEGIN)


def name_of(version: int, rank: int, count: int) -> str:
    """The name of a rank's file."""
    return f"version-{version}.rows-{rank}-of-{count}.safetensors"


def write(folder: Path, tensors: Mapping[str, Tensor], version: int, rank: int, count: int) -> str:
    """Write a rank's file of these tensors; its SHA-256.

    Raises:
        StorageError: it cannot be written.
    """
    wanted = {name: tensor for name, tensor in tensors.items() if shards.is_split(tensor) or not rank}
    parts = {name: streamed.part(shards.own(tensor)) for name, tensor in wanted.items()}
    storage.patiently(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
    return streamed.write(folder / name_of(version, rank, count), parts, anyway=True)


def own(manifest: Manifest, rank: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a version of which a rank has written its file, split as those of the same names in ``like``; on
    the first rank those that are not split, too.

    Raises:
        Unreadable: the file is not the announced one.
    """
    held = _read(manifest, rank)
    return {name: shards.of_own(value, like[name]) for name, value in held.items()}


@torch.no_grad()
def fill(blob: bytes, version: int, ours: Mapping[str, Tensor]) -> None:
    """Read the files of a manifest, one after another, into ``ours``, which may be changed where that fails.

    Raises:
        Unreadable: the manifest is of another version, a file not the announced one, or of other tensors.
    """
    manifest = Manifest.unpacked(blob)
    if manifest.version != version:
        raise Unreadable(f"their files are of version {manifest.version}")
    done = dict.fromkeys(ours, 0)
    for rank in range(len(manifest.sha256)):
        for name, rows in _read(manifest, rank).items():
            if name not in ours:
                raise Unreadable(f"{name} is not in the module")
            begin = done[name]
            _put(name, rows, ours[name], begin)
            done[name] = begin + (len(rows) if rows.ndim else 1)
    for name, tensor in ours.items():
        if done[name] != (len(tensor) if tensor.ndim else 1):
            raise Unreadable(f"{name} has {done[name]} rows, expected {len(tensor) if tensor.ndim else 1}")


def _put(name: str, rows: Tensor, ours: Tensor, begin: int) -> None:
    place = ours[begin : begin + len(rows)] if rows.ndim and ours.ndim else ours
    if (place.shape, place.dtype) != (rows.shape, rows.dtype):
        raise Unreadable(f"{name} is {rows.dtype} {tuple(rows.shape)}, expected {place.dtype} {tuple(place.shape)}")
    place.copy_(rows)


def _read(manifest: Manifest, rank: int) -> dict[str, Tensor]:
    """The tensors of a rank's file."""
    file, stated = manifest.files[rank], manifest.sha256[rank]
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise Unreadable(
            f"{str(file)!r} cannot be read ({error.strerror}): root must be storage that all nodes share"
        ) from error
    if hashlib.sha256(blob).hexdigest() != stated:
        raise Unreadable(f"{str(file)!r} is damaged: it does not match its SHA-256")
    try:
        return safetensors.torch.load(blob)
    except SafetensorError as error:
        raise Unreadable(f"{str(file)!r} cannot be read: {error}") from error


def keep(blob: bytes, folder: Path) -> None:
    """Copy the files of a manifest into another folder.

    Raises:
        StorageError: they cannot be read or written.
    """
    for file in Manifest.unpacked(blob).files:
        storage.patiently(partial(shutil.copyfile, file, folder / file.name), folder)


def moved(blob: bytes, folder: Path) -> bytes:
    """The manifest of files that ``keep`` has copied into a folder."""
    return Manifest.unpacked(blob)._replace(folder=str(folder.resolve())).packed()


def discard(blob: bytes, rank: int) -> None:
    """Remove a rank's file of a version that no walk acts under any more."""
    Manifest.unpacked(blob).files[rank].unlink(missing_ok=True)


def joined(run: str, version: int, folder: Path, sha256: Sequence[str]) -> bytes:
    """The manifest of the files of all ranks."""
    return Manifest(run, version, str(folder.resolve()), tuple(sha256)).packed()
