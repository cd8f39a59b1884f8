"""Data of the Hugging Face ``datasets`` library: saved by it, local files, or a name on the hub.

hf(path='...', split='train', image='image', label='label', caption='text', config='...')
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfusion.errors import ConfigError, unknown

EXTRA = "pip install 'rlfusion[datasets]'"


@dataclass(frozen=True)
class HF:
    """Where the rows are, and which columns hold what.

    Attributes:
        path: a folder that ``save_to_disk`` wrote, a folder of images or of Parquet files, a Parquet file, or a name on
            the hub (which needs the network, or the library's cache).
        split: which part.
        image: column of the images.
        label: column of integer or text labels; "" for none.
        caption: column of texts, which then are the conditions; "" for none.
        config: the data set's own configuration, where it has several.
    """

    path: str
    split: str = "train"
    image: str = "image"
    label: str = ""
    caption: str = ""
    config: str = ""

    def __post_init__(self) -> None:
        if self.label and self.caption:
            raise ConfigError(f"label = {self.label!r}, caption = {self.caption!r}: expected one of the two")

    def rows(self) -> tuple[list[Any], list[Any] | None, list[str] | None]:
        """(images, labels or captions or None, names of integer labels or None), in the order of the data.

        Raises:
            ConfigError: the library is not installed, nothing there, no such split or column, or an unreadable row.
        """
        table = self._table()
        for column in filter(None, (self.image, self.label, self.caption)):
            if column not in table.column_names:
                raise unknown(f"column of {self.path!r}", column, table.column_names)
        wanted = self.label or self.caption
        names = getattr(table.features[self.label], "names", None) if self.label else None
        return [self._row(table, i) for i in range(len(table))], list(table[wanted]) if wanted else None, names

    def _row(self, table: Any, i: int) -> Any:
        try:
            return table[i][self.image]
        except Exception as error:  # whatever the decoder of an image raises
            raise ConfigError(f"row {i} of {self.path!r} cannot be read: {error}") from error

    def _table(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(f"data = hf({self.path!r}): the library 'datasets' is not installed: {EXTRA}") from error
        path = Path(self.path)
        try:
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                held = datasets.load_from_disk(self.path)
                return held[self.split] if isinstance(held, datasets.DatasetDict) else held
            if path.suffix == ".parquet" or any(path.glob("*.parquet")):
                files = [str(path)] if path.is_file() else sorted(map(str, path.glob("*.parquet")))
                return datasets.load_dataset("parquet", data_files={self.split: files}, split=self.split)
            if path.is_dir():
                return datasets.load_dataset("imagefolder", data_dir=self.path, split=self.split)
            return datasets.load_dataset(self.path, self.config or None, split=self.split)
        except KeyError as error:
            raise unknown(f"split of {self.path!r}", self.split, held) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"data = hf({self.path!r}) cannot be loaded ({type(error).__name__}: {_first_line(error)}): expected a "
                "folder of save_to_disk, of images or of Parquet files, or a name on the hub and a way to reach it"
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else "no message"
