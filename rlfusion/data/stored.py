"""Images that people have and that are learned from as samples: with scores, or in pairs of which one is preferred.

pairs    a table with two images a row: jpg_0 and jpg_1 with label_0 and label_1 (Pick-a-Pic), image_0 and image_1,
         or chosen and rejected; scores of any size may stand as score_0 and score_1
scores   a table, or a folder with a metadata table, with a column score, reward or rating
neither  whatever else is data (``sources``)

Scores and preferences where they would not be read (``hf(...)``, an ``.npz``, settings beside a path) are refused.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, shorten
from rlfusion.data.columns import CAPTION, SUFFIXES, Columns, one_of, read_table, split_of
from rlfusion.data.dataset import Dataset, numbered
from rlfusion.data.files import METADATA
from rlfusion.data.folder import Folder
from rlfusion.data.images import Reader
from rlfusion.data.rows import caption_text, counted, pictures, shown
from rlfusion.data.sources import load, source
from rlfusion.data.splits import is_split
from rlfusion.data.table import Table, located

PAIRED = (("jpg_0", "jpg_1"), ("image_0", "image_1"), ("img_0", "img_1"), ("chosen", "rejected"))
RATED = (("label_0", "label_1"), ("score_0", "score_1"))
SCORE = ("score", "reward", "rating")
WITH_SETTINGS = re.compile(r"\s*(table|folder)\s*\(")
OF_PAIRS = re.compile(r"(jpg|image|img)_[01]|chosen|rejected")
UNREAD = re.compile(rf"{OF_PAIRS.pattern}|(label|score)_[01]|({'|'.join(SCORE)})s?")
"""What arrays and columns are called that no source but a table reads."""
UNSAID = ("false", "0")
"""What a column has_label (Pick-a-Pic) says of a pair that nobody has judged."""


@dataclass(frozen=True)
class StoredImages:
    """The images, each with its class or caption; a ``score`` (N,) float64 of each, None where none is known; and
    whether they are ``pairs``: images 2 i and 2 i + 1 are of one row, the preferred one with the score 1, the other 0.
    """

    data: Dataset
    score: Tensor | None = None
    pairs: bool = False


def read(data: str, size: int) -> StoredImages:
    """The images that ``data``, as of ``sources.load``, names; pictures are brought to ``size``.

    Raises:
        ConfigError: nothing there, or something that cannot be read or be understood in one way.
    """
    told = _told(data)
    table = _table(data if told is None else told.path, getattr(told, "delimiter", ""))
    if table is None:
        return StoredImages(_without_scores(load(data, size), data))
    names = [name for name in table.names if OF_PAIRS.fullmatch(name.lower())]
    rated = [name for name in table.names if name.lower() in SCORE]
    if (names or rated) and (column := split_of(table)):
        raise ConfigError(
            f"{str(table.file)!r} has a column {column!r} beside preferences or scores: expected a table of the images "
            "to learn from alone"
        )
    if names:
        _require_usual(data, told, "preferences")
        return _pairs(table, size)
    if not rated:
        return StoredImages(load(data, size))
    column = one_of(table, SCORE, "score", settable=False)
    score = [_number(row.get(column), f"{table.where(i)}, column {column!r}") for i, row in enumerate(table.rows)]
    if isinstance(told, Table):
        return StoredImages(told.load(size), torch.tensor(score, dtype=torch.float64))
    _require_usual(data, told, "scores")
    data = data if told is None else told.path
    parts = [place.name for place in Path(data).iterdir() if place.is_dir()] if Path(data).is_dir() else []
    if part := next(filter(is_split, sorted(parts)), ""):
        raise ConfigError(
            f"{data!r} has scores, and a folder {part!r}: expected a folder of the images to learn from alone"
        )
    found = Table(path=str(table.file)).load(size)
    return StoredImages(found, torch.tensor(score, dtype=torch.float64))


def _told(data: str) -> Table | Folder | None:
    """The table or folder that is told with settings, ``table(path='...')``; None for all other data."""
    made = source(data) if WITH_SETTINGS.match(data) else None
    return made if isinstance(made, Table | Folder) else None


def _require_usual(data: str, told: Table | Folder | None, what: str) -> None:
    """
    Raises:
        ConfigError: a setting beside the path, and the delimiter, which are all that is known of such tables.
    """
    if told is None:
        return
    usual = replace(type(told)(told.path), delimiter=told.delimiter) if isinstance(told, Table) else Folder(told.path)
    if told != usual:
        raise ConfigError(
            f"{shorten(data)} has {what}, and settings beside its path: expected path alone, of a table with the usual "
            "names of columns (docs/inputs.md)"
        )


def _without_scores(found: Dataset, data: str) -> Dataset:
    """Data without a table.

    Raises:
        ConfigError: they hold scores or preferences that were not read.
    """
    lost = [name for name in found.unread if UNREAD.fullmatch(name.lower())]
    if lost:
        raise ConfigError(
            f"{shorten(data)} holds {', '.join(lost)}, of which nothing would be learned: expected scores and "
            "preferences in a table (docs/inputs.md)"
        )
    return found


def _table(data: str, delimiter: str = "") -> Columns | None:
    """The table that a path names, or that lies in the folder that it names; None for all other data."""
    path = Path(data)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return read_table(path, delimiter)
    held = [file for file in sorted(path.iterdir()) if file.name.lower() in METADATA] if path.is_dir() else []
    return read_table(held[0]) if len(held) == 1 else None


def _pairs(table: Columns, size: int) -> StoredImages:
    left, right = _columns(table, PAIRED, "two images")
    rated = None if left.lower() == "chosen" else _columns(table, RATED, f"what people said of {left} and {right}")
    caption = one_of(table, CAPTION, "caption", settable=False)
    files, texts, score, out = [], [], [], Counter[str]()
    for i, row in enumerate(table.rows):
        first = 1 if rated is None else _first(row, rated, table.where(i), out)
        if first is None:
            continue
        texts += 2 * [caption_text(row.get(caption), f"{table.where(i)}, column {caption!r}")]
        files += [located(row.get(name), table.file.parent, "", table.where(i)) for name in (left, right)]
        score += [float(first), 1.0 - first]
    told = ", ".join(f"{count:,} {why}" for why, count in sorted(out.items()))
    if not files:
        raise ConfigError(f"{str(table.file)!r} has no pair with a preference: {told}")
    reader = Reader()
    x = pictures(files, size, reader)
    names, label = numbered(texts)
    parts = [f"{len(files) // 2:,} pairs", *([f"left out: {told}"] if told else []), *counted(reader.notes)]
    data = Dataset(x, label, names, 256, True, summary="; ".join(parts))
    return StoredImages(data, torch.tensor(score, dtype=torch.float64), pairs=True)


def _columns(table: Columns, known: tuple[tuple[str, str], ...], what: str) -> tuple[str, str]:
    """The two columns of ``what`` by their usual names, in any case.

    Raises:
        ConfigError: there are none, one of two, or several such.
    """
    own = {name.lower(): name for name in table.names}
    found = [(own[a], own[b]) for a, b in known if a in own and b in own]
    if len(found) == 1:
        return found[0]
    expected = ", or ".join(" and ".join(names) for names in known)
    several = "more than one of" if found else "not"
    raise ConfigError(f"{str(table.file)!r} has the columns {', '.join(table.names)}: for {what}, {several} {expected}")


def _first(row: dict[str, Any], rated: tuple[str, str], where: str, out: Counter[str]) -> int | None:
    """Whether the first of a pair is preferred, 1 or 0; None, counted in ``out``, for a pair without a preference.

    Raises:
        ConfigError: it is not said by two numbers, or the labels of Pick-a-Pic do not add up to 1.
    """
    judged = next((value for name, value in row.items() if name.lower() == "has_label"), True)
    if str(judged).lower() in UNSAID:
        out["that nobody has judged"] += 1
        return None
    a, b = (_number(row.get(name), f"{where}, column {name!r}") for name in rated)
    if rated[0].lower() == "label_0" and not (min(a, b) >= 0 and math.isclose(a + b, 1)):
        raise ConfigError(f"{where}: {rated[0]}, {rated[1]} = {a:g}, {b:g}: expected 1 and 0, 0 and 1, or .5 and .5")
    if a == b:
        out["tied"] += 1
        return None
    return int(a > b)


def _number(value: Any, where: str) -> float:
    """
    Raises:
        ConfigError: no finite number.
    """
    try:
        number = math.nan if isinstance(value, bool | None) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: it is {shown(value)}, expected a finite number")
    return number
