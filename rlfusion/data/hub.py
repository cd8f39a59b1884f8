"""Data of the Hugging Face ``datasets`` library: saved by it, local files, or a name on the hub.

hf(path='...', split='train', held='validation', image='image', label='label', caption='text', config='...')
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlfusion.common import hub
from rlfusion.common.errors import ConfigError, unknown
from rlfusion.data import splits
from rlfusion.data.dataset import Dataset, numbered
from rlfusion.data.images import Reader, colour, require_size, square
from rlfusion.data.rows import (
    caption_text,
    class_text,
    counted,
    line,
    of_names,
    require_known,
    require_texts,
    room,
    shown,
)

EXTRA = "pip install 'rlfusion[datasets]'"


@dataclass(frozen=True)
class HF:
    """The place of the rows, and the role of each column.

    Attributes:
        path: a folder that ``save_to_disk`` wrote, a folder of images or of Parquet files, a Parquet file, or a name on
            the hub (which needs the network, or the library's cache).
        split: which part to train on.
        held: which part is kept from training; "" for none of its own.
        image: column of the images.
        label: column of integer or text labels; "" for none.
        caption: column of texts, which then are the conditions; "" for none.
        config: the data set's own configuration, where it has several.
        background: the colour that shows through transparent parts.
        frames: "one" refuses animations, "first" takes their first picture.
    """

    path: str
    split: str = "train"
    held: str = ""
    image: str = "image"
    label: str = ""
    caption: str = ""
    config: str = ""
    background: str = "white"
    frames: str = "one"

    def __post_init__(self) -> None:
        require_texts(self)
        if self.label and self.caption:
            raise ConfigError(f"label = {self.label!r}, caption = {self.caption!r}: expected one of the two")
        if self.frames not in ("one", "first"):
            raise ConfigError(f"frames = {self.frames!r}: expected 'one' or 'first'")
        if self.held == self.split:
            raise ConfigError(f"split, held = {self.split!r}: expected two parts")
        colour(self.background)

    def load(self, size: int) -> Dataset:
        """The rows of ``split``, then those of ``held``, their images fitted to size x size RGB.

        Raises:
            ConfigError: the library is not installed, nothing there, no such split or column, a row that is no image or
                has no text.
        """
        reader, parts = Reader(self.background, self.frames), [self.split, *filter(None, [self.held])]
        tables = [self._table(part) for part in parts]
        for table in tables:
            for column in filter(None, (self.image, self.label, self.caption)):
                if column not in table.column_names:
                    raise unknown(f"column of {self.path!r}", column, table.column_names)
        count = sum(map(len, tables))
        if not len(tables[0]):
            raise ConfigError(f"data = hf({self.path!r}): the split {self.split!r} has no rows")
        x = room(count, 3, size, size)
        at, texts = 0, []
        for table in tables:
            for i in range(len(table)):
                x[at] = self._picture(table, i, size, reader)
                at += 1
            texts += self._texts(table)
        kind = "captions" if self.caption else "classes" if self.label else "none"
        names, label = self._named(texts, tables[0]) if texts else (("all",), torch.zeros(count, dtype=torch.int64))
        held = torch.arange(count) >= len(tables[0]) if self.held else None
        if held is not None and kind == "classes":
            require_known(names, label, held, repr(self.path))
        read = (self.image, self.label, self.caption)
        unread = tuple(name for name in tables[0].column_names if name not in read)
        left = [f"columns not read: {', '.join(unread)}"] if unread else []
        parts = [line(count, Counter()), of_names(names, kind), *counted(reader.notes), *left]
        return Dataset(torch.from_numpy(x), label, names, 256, kind == "captions", held, "; ".join(parts), unread)

    def _picture(self, table: Any, i: int, size: int, reader: Reader) -> Any:
        where = f"row {i} of {self.path!r}"
        try:
            image = table[i][self.image]
        except Exception as error:  # whatever the decoder of an image raises
            raise ConfigError(f"{where} cannot be read: {_first_line(error)}") from error
        if not callable(getattr(image, "convert", None)):
            held = type(image).__name__
            raise ConfigError(f"{where}: column {self.image!r} holds {held}, expected an image")
        require_size(image, where)
        return square(reader.rgb(image, where), size)

    def _texts(self, table: Any) -> list[str]:
        """The caption or the name of the class of each row; none where neither is asked for."""
        column = self.caption or self.label
        if not column:
            return []
        check = caption_text if self.caption else class_text
        names = self._class_names(table)
        found = []
        for i, value in enumerate(table[column]):
            where = f"row {i} of {self.path!r}, column {column!r}"
            if names and (not isinstance(value, int) or not 0 <= value < len(names)):
                raise ConfigError(f"{where}: the label is {shown(value)}, expected one of 0..{len(names) - 1}")
            found.append(names[value] if names else check(value, where))
        return found

    def _class_names(self, table: Any) -> list[str]:
        """The names that the data set gives to whole numbers; none where it gives none."""
        return list(getattr(table.features[self.label], "names", None) or []) if self.label else []

    def _named(self, texts: list[str], table: Any) -> tuple[tuple[str, ...], torch.Tensor]:
        names = self._class_names(table)
        if not names:
            return numbered(texts)
        place = {name: i for i, name in enumerate(names)}
        return tuple(names), torch.tensor([place[text] for text in texts])

    def _table(self, split: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(f"data = hf({self.path!r}): the library 'datasets' is not installed: {EXTRA}") from error
        try:
            held = self._loaded(datasets, split)
        except ConfigError:
            raise
        except Exception as error:  # the library's own errors, those of its readers and of the network
            raise ConfigError(
                f"data = hf({self.path!r}) cannot be loaded ({self._why(error)}): expected a "
                "folder of save_to_disk, of images or of Parquet files, or a name on the hub and a way to reach it"
            ) from error
        if not isinstance(held, datasets.DatasetDict):
            return held
        if split not in held:
            raise unknown(f"split of {self.path!r}", split, held)
        return held[split]

    def _loaded(self, datasets: Any, split: str) -> Any:
        path = Path(self.path)
        datasets.disable_progress_bars()
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            held = datasets.load_from_disk(self.path)
            return held if isinstance(held, datasets.DatasetDict) else datasets.DatasetDict({"train": held})
        if path.suffix == ".parquet" or any(path.glob("*.parquet")):
            files = parquet_files(path, split)
            return datasets.load_dataset("parquet", data_files={split: files}, split=split)
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=self.path, split=split)
        with hub.fetching():
            return datasets.load_dataset(self.path, self.config or None, split=split)

    def _why(self, error: Exception) -> str:
        return f"{type(error).__name__}: {_first_line(error)}" if Path(self.path).exists() else hub.failed(error)


def parquet_files(path: Path, split: str) -> list[str]:
    """The files of a split: ``train-00000-of-00002.parquet`` where names begin with splits; otherwise all are train.

    Raises:
        ConfigError: no such split, or only some names begin with one.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    owners = [re.split(r"[-_.]", file.stem)[0] for file in files]
    named = [splits.is_split(owner) for owner in owners]
    if path.is_file() or not any(named):
        owners = ["train"] * len(files)
    elif not all(named):
        raise ConfigError(f"{str(path)!r}: only some names begin with a split, not {files[named.index(False)].name!r}")
    if split not in owners:
        raise unknown(f"split of {str(path)!r}", split, set(owners))
    return [str(file) for file, owner in zip(files, owners) if owner == split]


def _first_line(error: Exception) -> str:
    message = str(error).strip()
    return message.splitlines()[0][:300] if message else "no message"
