"""A table of images: a CSV, TSV, JSON-lines or Parquet file whose rows name an image, or hold it, and its text."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.data import splits
from rlfusion.data.columns import Columns, read_table, roles, split_of
from rlfusion.data.dataset import Dataset
from rlfusion.data.rows import Found, Row, Source, assemble, caption_text, class_text, shown

TEXTS = {"captions": caption_text, "classes": class_text}


@dataclass(frozen=True)
class Table(Source):
    """Each row is a sample; an image may have several rows.

    Attributes:
        image: the column of the images: paths, or what Hugging Face writes into Parquet; "" finds it by its name.
        caption: the column of the captions; "" finds it by its name.
        label: the column of the classes; "" finds it by its name, where there is no caption.
        root: the folder that the paths are relative to; "" is the table's own.
        suffix: what is added to every path (".jpg", where the table has names without it).
        split_column: the column of the splits; "" is "split" in any case, where there is one.
        delimiter: between the fields of a .csv; "" is the comma (the tabulator in a .tsv).
    """

    image: str = ""
    caption: str = ""
    label: str = ""
    root: str = ""
    suffix: str = ""
    split_column: str = ""
    delimiter: str = ""

    def load(self, size: int) -> Dataset:
        """
        Raises:
            ConfigError: the table, a column, a row or an image cannot be used (named).
        """
        file = Path(self.path)
        table = read_table(file, self.delimiter)
        role = roles(table, self.conditions, self.image, self.caption, self.label)
        column = self._split_column(table)
        root = Path(self.root) if self.root else file.parent
        rows = []
        for i, held in enumerate(table.rows):
            where = table.where(i)
            image, named = located(held.get(role.image), root, self.suffix, where)
            part = class_text(held.get(column), f"{where}, column {column!r}") if column else ""
            rows.append(Row(image, named, part, text_of(held, role.text, role.kind, where)))
        found = Found(rows, role.kind, notes=[f"{role.kind} from the column {role.text!r}"] if role.text else [])
        return assemble(self, found, self._parts(rows, column), size)

    def _split_column(self, table: Columns) -> str:
        if self.split == splits.NONE:
            return ""
        column = self.split_column or split_of(table)
        if column and column not in table.names:
            raise splits.unknown(f"column of {str(table.file)!r}", column, table.names)
        if not column and (self.split or self.held):
            raise ConfigError(
                f"split, held = {self.split!r}, {self.held!r}: {str(table.file)!r} has no column 'split', expected "
                "split_column='NAME'"
            )
        return column

    def _parts(self, rows: list[Row], column: str) -> splits.Parts | None:
        if not column:
            return None
        where = f"the column {column!r} of {self.path!r}"
        parts = splits.choose(Counter(row.split for row in rows), self.split, self.held, where)
        if parts is None:
            raise ConfigError(f"{where} has no training part by name: expected split='NAME', or split='none'")
        return parts


def text_of(row: dict[str, Any], column: str, kind: str, where: str) -> str:
    """The label or caption of a row; "" where there is none to read.

    Raises:
        ConfigError: it is no text.
    """
    return TEXTS[kind](row.get(column), f"{where}, column {column!r}") if column else ""


def located(cell: Any, root: Path, suffix: str, where: str) -> tuple[Path | bytes, str]:
    """The image that a cell names or holds, and what errors call it.

    Raises:
        ConfigError: neither the path of a file nor the bytes of an image.
    """
    if isinstance(cell, dict):  # {"bytes": ..., "path": ...}, as Hugging Face writes images into Parquet
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytes):
        return cell, f"the image in {where}"
    if not isinstance(cell, str) or not cell.strip() or "\0" in cell:
        raise ConfigError(f"{where}: the image is {shown(cell)}, expected the path of a file")
    if "://" in cell:
        raise ConfigError(f"{where}: {cell[:200]!r} is an address; expected the path of a file (download them first)")
    for name in (cell, cell.replace("\\", "/")):
        file = root / f"{name}{suffix}"
        try:
            if file.is_file():
                return file, f"image {str(file)!r} ({where})"
        except OSError:  # a name that is too long for the file system
            break
    raise ConfigError(f"{where}: there is no file {cell[:200] + suffix!r} below {str(root)!r}{_near(root / cell)}")


def _near(file: Path) -> str:
    """A file of that name in another case, or with a suffix."""
    if not file.parent.is_dir():
        return ", expected root='FOLDER'"
    name = file.name.lower()
    like = [f.name for f in sorted(file.parent.iterdir()) if name in (f.name.lower(), f.stem.lower())]
    return f"; did you mean {like[0]!r}?" if like else ", expected root='FOLDER' of the images if they lie elsewhere"
