"""Rows: an image each, with its split and its label or caption; and how they become one data set.

Folders, tables and Hugging Face data sets are all brought to rows first, so that what a label, a caption and a held-out
part are is decided in one place.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.data.dataset import Dataset, numbered
from rlfusion.data.images import Reader, colour
from rlfusion.data.splits import Parts

SHOWN = 6
Conditions = Literal["auto", "classes", "captions", "none"]


class Row(NamedTuple):
    """One sample: ``image`` a file or its bytes, ``where`` what errors call it, ``split`` the part it lies in, and the
    text of its class or caption ("" for none).
    """

    image: Path | bytes
    where: str
    split: str = ""
    text: str = ""


@dataclass(frozen=True)
class Source:
    """The settings that every source of image files has.

    Attributes:
        path: the folder or file.
        split: the part to train on; "" finds it by its name (train beside val, validation or test); "none" says that
            such names are classes.
        held: the part kept from training; "" finds it by its name, and where there is none ``held_out`` divides.
        conditions: what the model is conditioned on: "captions", "classes", "none", or "auto": captions where they are.
        background: the colour that shows through transparent parts.
        frames: "one" refuses animations and files of several pages, "first" takes their first picture.
    """

    path: str
    split: str = ""
    held: str = ""
    conditions: Conditions = "auto"
    background: str = "white"
    frames: Literal["one", "first"] = "one"

    def __post_init__(self) -> None:
        require_texts(self)
        if not self.path:
            raise ConfigError("path = '': expected a folder or a file")
        colour(self.background)


@dataclass
class Found:
    """What a source holds: its rows; what the texts are ("captions", "classes", "none"); what was ``left`` out and why,
    counted; and ``notes``, what else its line is to say.
    """

    rows: list[Row]
    kind: str
    left: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def of(self, parts: Parts | None) -> "Found":
        """The rows of ``parts`` alone; those of other splits are left out."""
        if parts is None:
            return self
        kept = [row for row in self.rows if row.split in parts]
        others = Counter(f"in the split {row.split!r}" for row in self.rows if row.split not in parts)
        count = sum(row.split == parts.train for row in kept)
        message = f"{count:,} of {parts.train!r} to train on"
        if parts.held:
            message += f", {len(kept) - count:,} of {parts.held!r} held out"
        return replace(self, rows=kept, left=self.left + others, notes=[message, *self.notes])


def require_texts(settings: Any) -> None:
    """
    Raises:
        ConfigError: a setting that is to be a text is something else.
    """
    for name, value in vars(settings).items():
        if not isinstance(value, str) or "\0" in value:
            raise ConfigError(f"{name} = {value!r}: expected a text")


def assemble(source: Source, found: Found, parts: Parts | None, size: int) -> Dataset:
    """The data set of ``found``: every image read once, brought to size x size RGB.

    Raises:
        ConfigError: no row, an image that cannot be read, a class that is only held out, or more than the memory holds.
    """
    found, reader = found.of(parts), Reader(source.background, source.frames)
    rows, held = found.rows, parts.held if parts else ""
    x = pictures([(row.image, row.where) for row in rows], size, reader)
    names: tuple[str, ...] = ("all",)
    label = torch.zeros(len(rows), dtype=torch.int64)
    if found.kind != "none":
        names, label = numbered([row.text for row in rows])
    mask = torch.tensor([row.split == held for row in rows]) if held else None
    if mask is not None and found.kind == "classes":
        require_known(names, label, mask, repr(source.path))
    parts = [line(len(rows), found.left), of_names(names, found.kind), *found.notes, *counted(reader.notes)]
    return Dataset(x, label, names, 256, found.kind == "captions", mask, "; ".join(parts))


def pictures(files: Sequence[tuple[Path | bytes, str]], size: int, reader: Reader) -> Tensor:
    """Images (N, 3, size, size), each file read once however often it is named."""
    x = room(len(files), 3, size, size)
    seen: dict[Path | bytes, int] = {}
    for i, (image, where) in enumerate(files):
        known = seen.setdefault(image, i)
        x[i] = reader.fitted(image, where, size) if known == i else x[known]
    return torch.from_numpy(x)


def room(*shape: int) -> np.ndarray:
    """An empty float32 array.

    Raises:
        ConfigError: larger than the memory of this machine.
    """
    needed = 4 * int(np.prod([int(n) for n in shape], dtype=object))
    if needed > memory():
        raise ConfigError(
            f"{shape[0]:,} samples of {' x '.join(map(str, shape[1:]))} take {needed / 1e9:.3g} GB: expected at most "
            f"the memory here, {memory() / 1e9:.3g} GB (fewer samples, or a smaller size)"
        )
    return np.empty(shape, dtype=np.float32)


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_known(names: Sequence[str], label: Tensor, held: Tensor, where: str) -> None:
    """
    Raises:
        ConfigError: a class that only the held-out part has.
    """
    trained = set(label[~held].tolist())
    strange = sorted(set(label[held].tolist()) - trained)
    if strange:
        raise ConfigError(
            f"the held-out part of {where} has {len(strange)} classes that the training part lacks, the first "
            f"{names[strange[0]]!r}: expected the same, or split='NAME' to train on one part and divide it by held_out"
        )


def class_text(value: Any, where: str) -> str:
    """A label as the name of its class, without the blanks around it.

    Raises:
        ConfigError: neither a text nor a whole number.
    """
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: the label is {shown(value)}, expected a text or a whole number")
    return plain(value.strip(), where)


def caption_text(value: Any, where: str) -> str:
    """A caption without the blanks around it.

    Raises:
        ConfigError: no text, or an empty one.
    """
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: the caption is {shown(value)}, expected a text")
    return plain(value.strip(), where)


def plain(text: str, where: str) -> str:
    """``text`` composed (NFC), as names from different file systems are compared.

    Raises:
        ConfigError: it cannot be written as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {text!r} is not UTF-8") from error
    return unicodedata.normalize("NFC", text)


def shown(value: Any) -> str:
    """A value that is not what it should be, with its type."""
    return "missing" if value is None else f"{repr(value)[:60]} ({type(value).__name__})"


def line(count: int, left: Counter[str]) -> str:
    """ "1,797 images, 3 left out: 2 .txt, 1 hidden"."""
    message = f"{count:,} image" + ("" if count == 1 else "s")
    if not left:
        return message
    reasons = [f"{n:,} {reason}" for reason, n in left.most_common()]
    more = [f"{sum(n for _, n in left.most_common()[SHOWN:]):,} others"] if len(reasons) > SHOWN else []
    return f"{message}, {left.total():,} left out: {', '.join(reasons[:SHOWN] + more)}"


def of_names(names: Sequence[str], kind: str) -> str:
    """The names of conditions in words, as in "3 classes (cat, dog, owl)".

    ``kind`` is "none", "classes" or "captions".
    """
    if kind == "none":
        return "no classes"
    what = {"captions": "distinct caption", "classes": "class"}[kind]
    if len(names) != 1:
        what = {"captions": "distinct captions", "classes": "classes"}[kind]
    some = "" if kind == "captions" else f" ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
    return f"{len(names):,} {what}{some}"


def counted(notes: Counter[str]) -> Iterable[str]:
    """Each note with how often it came, in alphabetical order: "3 turned by EXIF"."""
    return (f"{n:,} {what}" for what, n in sorted(notes.items()))
