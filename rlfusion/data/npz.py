"""An ``.npz`` of images: which array is what, where its channels are, what its values mean. Recognised where there is
one answer, otherwise a setting is asked for.

    names    images | labels | captions, or the usual others (x, data, arr_0 | y, targets, arr_1 | texts, prompts), each
             also with train, val or test before or behind it (x_train, test_labels)
    layout   NHW, NHWC or NCHW: the channels are the axis of 1 or 3, otherwise of 2 or 4, otherwise the sides are equal
    range    uint8 is 0..255, bool 0..1, floats up to 1 are -1..1 where one is below 0, else 0..1; all else is asked for
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.data import splits
from rlfusion.data.archive import Archive
from rlfusion.data.arrays import Layout, Pixels, Range, captions_of, labels_of, pixels
from rlfusion.data.dataset import Dataset, captioned, numbered
from rlfusion.data.rows import line, of_names, require_known, require_texts

IMAGES = ("images", "image", "imgs", "x", "data", "samples", "arr_0")
LABELS = ("labels", "label", "y", "targets", "target", "classes", "arr_1")
CAPTIONS = ("captions", "caption", "texts", "text", "prompts", "prompt")
USUAL = {"images": IMAGES, "labels": LABELS, "captions": CAPTIONS}
ROLES = {name: role for role, names in USUAL.items() for name in names}


class Part(NamedTuple):
    """The arrays of one split: its images, and the texts or whole numbers (N,) of them."""

    images: Pixels
    given: np.ndarray | None

    @property
    def x(self) -> np.ndarray:
        """The array of the images."""
        return self.images.x


@dataclass(frozen=True)
class Npz:
    """Arrays of images, and optionally labels or captions (N,); captions come before labels.

    Attributes:
        path: the file.
        images: the array of the images; "" finds it by its name.
        labels: the array of the labels: whole numbers from 0, names, or one-hot rows; "" finds it; "none" reads none.
        captions: the array of the captions; "" finds it; "none" reads none.
        layout: the order of the axes: "NHW", "NHWC", "NCHW", or "auto".
        range: what is black and white: "-1..1", "0..1", "0..255", "0..65535", or "auto".
        split: the part to train on; "" finds it by its name (x_train beside x_test); "none" reads one array, by name.
        held: the part kept from training; "" finds it.
    """

    path: str
    images: str = ""
    labels: str = ""
    captions: str = ""
    layout: Layout = "auto"
    range: Range = "auto"
    split: str = ""
    held: str = ""

    def __post_init__(self) -> None:
        require_texts(self)

    def load(self, size: int = 0) -> Dataset:
        """The arrays as they are: ``size`` is that of image files, and changes nothing.

        Raises:
            ConfigError: the file or an array is damaged, missing, or can be understood in several ways.
        """
        with Archive(Path(self.path)) as archive:
            held = self._keys(archive.names)
            found = Counter({split: 1 for split in held})
            parts = None if set(held) == {""} else splits.choose(found, self.split, self.held, repr(self.path))
            if set(held) == {""} and (self.split not in ("", splits.NONE) or self.held):
                raise unknown(f"split of {self.path!r}", self.split or self.held, ["none"])
            if parts is None and set(held) != {""}:
                raise ConfigError(f"{self.path!r} holds {archive.names}: expected split='NAME', or images='NAME'")
            names = [parts.train, *filter(None, [parts.held])] if parts else [""]
            read = [self._part(archive, held[names[0]], self.layout, self.range)]
            layout, span = read[0].images.layout, read[0].images.span  # what the first part's are, the second's are
            read += [self._part(archive, held[name], layout, span) for name in names[1:]]
            unread = "labels" if "captions" in held[names[0]] else ""
            used = {key for name in names for role, key in held[name].items() if role != unread}
        return self._joined(read, names, [name for name in archive.names if name not in used], held[names[0]])

    def _keys(self, names: list[str]) -> dict[str, dict[str, str]]:
        """{split: {role: name of the array}}."""
        given = {"images": self.images, "labels": self.labels, "captions": self.captions}
        explicit = {role: name for role, name in given.items() if name and (role == "images" or name != "none")}
        for name in explicit.values():
            if name not in names:
                raise unknown(f"array of {self.path!r}", name, names)
        found = self._by_name([name for name in names if name not in explicit.values()], given)
        if explicit:  # one part, of these and of what has no split in its name
            found = {"": {**found.get("", {}), **explicit}}
        found = {split: held for split, held in found.items() if "images" in held}
        if not found:
            beside = " beside these settings" if explicit else " (and optional 'labels' or 'captions')"
            raise ConfigError(f"{self.path!r} holds {names[:12]}: expected an array 'images'{beside}, or images='NAME'")
        return found

    def _by_name(self, names: list[str], given: dict[str, str]) -> dict[str, dict[str, str]]:
        """{split: {role: name}} of the roles that no setting names."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            base, split = _of_split(name.lower())
            role = ROLES.get(base)
            if role is None or given[role]:
                continue
            held = found.setdefault(split if self.split != splits.NONE else "", {})
            if role in held:
                raise ConfigError(
                    f"{self.path!r} has {held[role]!r} and {name!r}, of which each may be the {role}: expected "
                    f"{role}='NAME'"
                )
            held[role] = name
        return found

    def _part(self, archive: Archive, held: dict[str, str], layout: str, span: str) -> Part:
        images = archive.read(held["images"])
        what = f"{held['images']!r} in {self.path!r}"
        read = pixels(images, layout, span, what)
        given = None
        for role, checked in (("captions", captions_of), ("labels", labels_of)):
            if role in held and given is None:
                given = checked(archive.read(held[role]), len(read.x), f"{held[role]!r} in {self.path!r}")
        return Part(read, given)

    def _joined(self, read: list[Part], names: list[str], left: list[str], held: dict[str, str]) -> Dataset:
        """One data set of the training part and the held-out part, if there is one."""
        first, last = read[0], read[-1]
        if first.x.shape[1:] != last.x.shape[1:] or (first.given is None) != (last.given is None):
            raise ConfigError(
                f"{names} of {self.path!r} have samples {first.x.shape[1:]} and {last.x.shape[1:]}, "
                f"{[part.given is not None for part in read]} with labels: expected the same of both"
            )
        x = torch.from_numpy(first.x if len(read) == 1 else np.concatenate([part.x for part in read]))
        mask = None
        if len(read) > 1:
            mask = torch.arange(len(x)) >= len(first.x)
        kind = "none" if first.given is None else "captions" if "captions" in held else "classes"
        given = None if first.given is None else np.concatenate([part.given for part in read if part.given is not None])
        data = _dataset(x, given, kind, first.images.levels)
        if mask is not None and kind == "classes":
            require_known(data.names, data.label, mask, repr(self.path))
        own = first.images
        sides = f"{own.dtype} {'x'.join(map(str, x.shape[2:]))} of {x.shape[1]} channel{'s'[: x.shape[1] > 1]}"
        low, high = min(part.images.low for part in read), max(part.images.high for part in read)
        values = f"values {low:.4g}..{high:.4g} of {own.span}"
        parts = [line(len(x), Counter()), f"{sides} ({own.layout})", of_names(data.names, kind), values]
        if len(names) > 1:
            parts.append(f"{len(first.x):,} of {names[0]!r} to train on, {len(last.x):,} of {names[1]!r} held out")
        if left:
            parts.append(f"arrays not read: {', '.join(left[:6])}{', ...' if len(left) > 6 else ''}")
        return Dataset(data.x, data.label, data.names, data.levels, data.captioned, mask, "; ".join(parts), tuple(left))


def _of_split(name: str) -> tuple[str, str]:
    """("x", "train") of "x_train" and of "train_x"; ("x", "") of "x"."""
    first, _, rest = name.partition("_")
    front, _, last = name.rpartition("_")
    if rest and splits.is_split(first):
        return rest, first
    return (front, last) if front and splits.is_split(last) else (name, "")


def _dataset(x: torch.Tensor, given: np.ndarray | None, kind: str, levels: int | None) -> Dataset:
    if given is None:
        return Dataset(x, torch.zeros(len(x), dtype=torch.int64), ("0",), levels)
    if kind == "captions":
        return captioned(x, given.tolist(), levels)
    if given.dtype.kind == "U":
        names, label = numbered(given.tolist())
        return Dataset(x, label, names, levels)
    return Dataset(x, torch.from_numpy(given), tuple(str(i) for i in range(int(given.max()) + 1)), levels)


def npz(path: Path) -> Dataset:
    """The arrays in ``path``, as ``Npz`` by its defaults."""
    return Npz(str(path)).load()
