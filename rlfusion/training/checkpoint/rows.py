"""Tensors that are split over ranks, in a checkpoint: each rank writes its rows, whoever reads them has other ranks.

    <key>.rows-<r>-of-<n>.safetensors    the rows of rank r of n, below the top-level key of the state

The rows of a tensor, file by file, are the tensor. A process whose network is split reads its own rows alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rlfusion.common import shards

NAME = re.compile(r"(.+)\.rows-([0-9]+)-of-([0-9]+)\.safetensors")


def apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that are not split; and this rank's rows of those that are."""
    split = {name: shards.own(tensor) for name, tensor in tensors.items() if shards.is_split(tensor)}
    return {name: tensor for name, tensor in tensors.items() if name not in split}, split


def name_of(key: str, rank: int, count: int) -> str:
    """The name of a rank's file."""
    return f"{key}.rows-{rank}-of-{count}.safetensors"


def read(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of such files: split where this process has a network that is, else whole.

    Raises:
        ValueError: the file of a rank is missing, or files of one key do not have the same tensors.
    """
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    counts: dict[str, int] = {}
    for match in filter(None, map(NAME.fullmatch, names)):
        key, rank, count = match[1], int(match[2]), int(match[3])
        if counts.setdefault(key, count) != count:
            raise ValueError(f"there are rows of {key!r} of {count} ranks and of {counts[key]}")
        found[key][rank] = folder / match[0]
    tensors: dict[str, Tensor] = {}
    for key, files in found.items():
        if sorted(files) != list(range(counts[key])):
            raise ValueError(f"there are rows of {key!r} of ranks {sorted(files)}, expected all {counts[key]}")
        tensors |= _joined([files[rank] for rank in sorted(files)])
    return tensors


def _joined(files: list[Path]) -> dict[str, Tensor]:
    held = [safe_open(file, "pt") for file in files]
    names = set(held[0].keys())
    if any(set(one.keys()) != names for one in held):
        raise ValueError(f"{files[0].name} and the files beside it do not have the same tensors")
    return {name: _tensor([one.get_slice(name) for one in held]) for name in sorted(names)}


def _tensor(parts: list) -> Tensor:
    """The rows of all ``parts`` that this process holds."""
    lengths = [part.get_shape()[0] for part in parts]
    wanted = shards.held(sum(lengths))
    taken, begin = [], 0
    for part, length in zip(parts, lengths):
        low, high = max(wanted.start, begin) - begin, min(wanted.stop, begin + length) - begin
        if low < high:
            taken.append(part[low:high])
        begin += length
    own = torch.cat(taken) if taken else parts[0][0:0]
    return shards.placed(own, (sum(lengths), *parts[0].get_shape()[1:]))
