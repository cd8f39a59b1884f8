"""The learner's weights as the walks to come act under them: copied, packed, or as files of each rank's rows."""

import shutil
from pathlib import Path

from torch import Tensor, nn

from rlfusion.common import row_files, shards, storage
from rlfusion.common.weights import ADAPTER, Live, Weights, learned
from rlfusion.training.ranks import current

FOLDER = "weights"
"""The folder of a run in which such files are, as long as walks act under them."""


def in_files(policy: nn.Module, workers: bool) -> bool:
    """Whether weights go to ``workers`` in files: those of a network that is split, but adapters, which are small."""
    return workers and bool(shards.roots(policy)) and not any(ADAPTER in name for name in policy.state_dict())


def acting(policy: nn.Module, version: int, workers: bool, lag: int, folder: Path) -> Weights:
    """The weights that ``policy`` has. In this process, and not ahead of the learner, all that act under them are
    collected before they change again: they need not be packed. All ranks ask for those of a network that is split.

    Args:
        folder: of the run.
    """
    if in_files(policy, workers):
        return filed(learned(policy), version, folder)
    if workers and shards.roots(policy):
        return Weights.whole(policy, version, here=storage.writes())
    return Live(policy, version) if not workers and not lag else Weights.of(policy, version)


def filed(tensors: dict[str, Tensor], version: int, folder: Path) -> Weights:
    """The manifest of these tensors, of which each rank writes its rows.

    Raises:
        StorageError: they cannot be written.
    """
    ranks, place = current(), folder / FOLDER
    digest = row_files.write(place, tensors, version, ranks.rank, ranks.count)
    blob = row_files.joined(folder.name, version, place, [told.decode() for told in ranks.exchange(digest.encode())])
    return Weights.manifest(version, blob)


def discard(weights: Weights) -> None:
    """What is left of weights under which no walk acts any more is removed."""
    if type(weights) is Weights and row_files.is_manifest(weights.blob):
        row_files.discard(weights.blob, current().rank)


def clear(policy: nn.Module, workers: bool, folder: Path) -> None:
    """Remove what a run, or one that was broken off, has left of such files, before any are written or after all."""
    if not in_files(policy, workers):
        return
    if storage.writes():
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    current().exchange(b"")
