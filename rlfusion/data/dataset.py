"""A data set in memory: samples in [-1, 1] as (N, C, H, W) float32, with integer labels (N,).

``digits`` is scikit-learn's copy of the UCI handwritten digits: 1,797 real 8x8 images of 10 classes, 0..16 grey levels.
"""

import gzip
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import Key, stream


@dataclass(frozen=True)
class Dataset:
    """Samples x (N, C, H, W) in [-1, 1], labels (N,) int64 in 0..classes-1, and the names of the classes.

    ``captioned``: the names are captions, distinct ones, and the model is to read them. ``levels``: the values lie on
    so many even steps from -1 to 1 (256: 8 bits); None for continuous values. ``held`` (N,) bool marks the samples that
    the data themselves keep from training (a folder ``val/``, say); None where they do not say. ``summary``: in one
    line what was read, how, and what was left out; ``unread`` are the arrays or columns beside it.
    """

    x: Tensor
    label: Tensor
    names: tuple[str, ...]
    levels: int | None = None
    captioned: bool = False
    held: Tensor | None = None
    summary: str = ""
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.label.shape != self.x.shape[:1]:
            raise ConfigError(
                f"samples are (N, C, H, W), labels (N,): got {tuple(self.x.shape)}, {tuple(self.label.shape)}"
            )
        if len(self.label) and not 0 <= int(self.label.min()) <= int(self.label.max()) < len(self.names):
            raise ConfigError(f"labels lie in 0..{len(self.names) - 1}: got {self.label.min()}..{self.label.max()}")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def grouped(self) -> bool:
        """The samples fall into two or more classes, of which a judge can learn: captions only if each has a second."""
        counts = self.label.bincount(minlength=self.classes)
        return self.classes > 1 and (not self.captioned or int(counts.min()) > 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.x.shape[1:])

    @cached_property
    def sha256(self) -> str:
        """Digest of the samples, their labels and the names: of what a model learns from, wherever it lies."""
        digest = hashlib.sha256(json.dumps([self.names, self.shape, self.levels, self.captioned]).encode())
        for part in (self.x, self.label, *([] if self.held is None else [self.held])):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def split(self, held_out: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """(training, held-out) parts. Where the data mark their own (``held``), those; otherwise stratified by class,
        ``held_out`` being the second's share of each class.
        """
        if self.held is not None:
            held = self.held.numpy()
            return self._take(np.flatnonzero(~held)), self._take(np.flatnonzero(held))
        rest, out = [], []
        for c in range(self.classes):
            index = stream(seed, "split", c).permutation((self.label == c).nonzero().flatten().numpy())
            cut = round(held_out * len(index))
            out.append(index[:cut])
            rest.append(index[cut:])
        return self._take(np.sort(np.concatenate(rest))), self._take(np.sort(np.concatenate(out)))

    def require_parts(self, held_out: float) -> None:
        """
        Raises:
            ConfigError: ``split(held_out)`` leaves nothing in one part, or no training sample of a class.
        """
        parts = [len(part) for part in self.split(held_out)]
        if not all(parts):
            raise ConfigError(f"held_out = {held_out} splits {len(self)} samples into {parts}: expected some in both")
        self.require_trained(held_out)

    def require_trained(self, held_out: float) -> None:
        """
        Raises:
            ConfigError: ``split(held_out)`` keeps all samples of a class from training.
        """
        trained = self.split(held_out)[0].label.bincount(minlength=self.classes)
        lost = ((trained == 0) & (self.label.bincount(minlength=self.classes) > 0)).nonzero().flatten().tolist()
        if lost and not self.captioned:
            count = int((self.label == lost[0]).sum())
            raise ConfigError(
                f"held_out = {held_out} leaves no training sample of class {self.names[lost[0]]!r}, which has {count} "
                f"({len(lost)} such classes): expected a smaller held_out, or more samples"
            )

    def _take(self, index: np.ndarray) -> "Dataset":
        at = torch.from_numpy(index)
        return Dataset(self.x[at], self.label[at], self.names, self.levels, self.captioned)


def digits() -> Dataset:
    """The 1,797 handwritten digits, 1x8x8."""
    table = torch.from_numpy(_digits_table().astype(np.float32))
    x = table[:, :64].reshape(-1, 1, 8, 8) / 8 - 1
    return Dataset(x, table[:, 64].long(), tuple(str(i) for i in range(10)), levels=17)


def _digits_table() -> np.ndarray:
    """(1797, 65): the 64 pixels of each digit, 0 to 16, and its class. The file in scikit-learn's package is read as it
    is, because importing scikit-learn (and scipy, pandas) takes longer than all else that a start does beside torch.
    """
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package and package.origin else None
    if file and file.is_file():
        with gzip.open(file, "rt", encoding="ascii") as lines:
            return np.loadtxt(lines, delimiter=",")
    from sklearn.datasets import load_digits  # a scikit-learn that keeps them elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def captioned(x: Tensor, captions: list[str], levels: int | None) -> Dataset:
    """Samples with a caption each; equal captions are one prompt."""
    names, label = numbered(captions)
    return Dataset(x, label, names, levels, captioned=True)


def numbered(values: list[str]) -> tuple[tuple[str, ...], Tensor]:
    """The distinct values in the order of their names (whole numbers: 2 before 10), and the number (N,) of each value
    among them.
    """
    distinct = set(values)
    whole = all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", value) for value in distinct)
    names = tuple(sorted(distinct, key=int if whole else None))
    place = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([place[value] for value in values], dtype=torch.int64)


def batch_indices(total: int, batch: int, step: int, *key: Key) -> np.ndarray:
    """The indices (batch,) of one training step: epoch by epoch in a keyed random order, pure in ``step``."""
    first = step * batch
    epochs = range(first // total, (first + batch - 1) // total + 1)
    order = np.concatenate([stream(*key, "epoch", e).permutation(total) for e in epochs])
    return order[first - epochs[0] * total :][:batch]
