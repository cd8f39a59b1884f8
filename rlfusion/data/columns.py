"""Tables as files: CSV, TSV, JSON lines and Parquet as columns by name; and which column holds what.

The cells of CSV and TSV are read without the blanks around them, as prompts' are.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlfusion.common.errors import ConfigError, unknown

SEPARATED = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*SEPARATED, ".jsonl", ".ndjson", ".parquet")
IMAGE = ("file_name", "filename", "file", "image", "img", "path", "filepath", "file_path", "image_path", "image_id")
CAPTION = ("text", "caption", "prompt")
LABEL = ("label", "class", "category", "label_name", "class_name")
SPLIT = ("split",)
EXTRA = "pip install 'rlfusion[datasets]'"


@dataclass(frozen=True)
class Columns:
    """A table: its file, the names of its columns, its rows, and the number of each in the file, for errors."""

    file: Path
    names: list[str]
    rows: list[dict[str, Any]]
    first: int = 1

    def where(self, i: int) -> str:
        """What errors call row ``i``, counted from 0."""
        return f"row {i + self.first} of {str(self.file)!r}"


class Roles(NamedTuple):
    """The columns of the images, and of the texts; ``kind`` says what these are: captions, classes or none."""

    image: str
    text: str
    kind: str


def read_table(file: Path, delimiter: str = "") -> Columns:
    """The table in ``file``, recognised by its suffix; ``delimiter`` of a .csv or .tsv, "" for its own.

    Raises:
        ConfigError: no such file, another suffix, no row, or one that cannot be read (named).
    """
    if not file.is_file():
        raise ConfigError(f"table {str(file)!r} does not exist")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"table {str(file)!r}: expected one of {', '.join(SUFFIXES)}")
    if suffix in SEPARATED:
        table = _separated(file, delimiter or SEPARATED[suffix])
    elif delimiter:
        raise ConfigError(f"delimiter = {delimiter!r} of {str(file)!r}: expected it for .csv and .tsv alone")
    else:
        table = _parquet(file) if suffix == ".parquet" else _lines(file)
    if not table.rows:
        raise ConfigError(f"table {str(file)!r} has no rows")
    return table


def read_text(file: Path) -> str:
    """A text file: UTF-8, with or without its mark, or UTF-16 with it.

    Raises:
        ConfigError: another encoding, or no text.
    """
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(file)!r} is not UTF-8 (byte {error.start}): expected a text in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise ConfigError(f"{str(file)!r} holds zero bytes: expected a text in UTF-8")
    return text


def _separated(file: Path, delimiter: str) -> Columns:
    if len(delimiter) != 1:
        raise ConfigError(f"delimiter = {delimiter!r}: expected one character")
    try:
        text = io.StringIO(read_text(file), newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
        read = ([cell.strip() for cell in row] for row in reader)
        lines = [row for row in read if len(row) > 1 or any(row)]
    except csv.Error as error:
        raise ConfigError(f"table {str(file)!r} cannot be read: {error}") from error
    if not lines:
        raise ConfigError(f"table {str(file)!r} is empty: expected a line of column names")
    names = lines[0]
    if len(set(names)) < len(names) or not all(names[1:]):  # a first column without a name is the index of pandas
        raise ConfigError(f"table {str(file)!r} begins with {names}: expected distinct names of columns")
    for i, row in enumerate(lines[1:], 1):
        if len(row) != len(names):
            raise ConfigError(f"row {i} of {str(file)!r} has {len(row)} fields: expected {len(names)}, as the names")
    return Columns(file, names, [dict(zip(names, row)) for row in lines[1:]])


def _lines(file: Path) -> Columns:
    rows, names = [], {}
    for number, text in enumerate(read_text(file).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_distinct)
        except (ValueError, RecursionError) as error:
            message = " ".join(str(error).split())
            raise ConfigError(f"line {number} of {str(file)!r} cannot be read as JSON: {message}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"line {number} of {str(file)!r} is {type(row).__name__}: expected an object {{...}}")
        rows.append(row)
        names.update(dict.fromkeys(row))
    return Columns(file, list(names), rows)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError("a key is given twice")
    return held


def _parquet(file: Path) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"table {str(file)!r}: the library 'pyarrow' is not installed: {EXTRA}") from error
    try:
        table = pyarrow.parquet.ParquetFile(file).read()
        return Columns(file, list(table.column_names), table.to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError, UnicodeError, OverflowError) as error:
        message = " ".join(str(error).split())[:200]
        raise ConfigError(f"table {str(file)!r} cannot be read as Parquet: {message}") from error


def roles(table: Columns, conditions: str, image: str, caption: str, label: str) -> Roles:
    """The role of each column: by the settings, and where they are "" by the usual names.

    Raises:
        ConfigError: no such column, none that is known, or several that could be meant.
    """
    where = repr(str(table.file))
    if caption and label:
        raise ConfigError(f"caption, label = {caption!r}, {label!r}: expected one of the two")
    for setting, name in (("captions", caption), ("classes", label)):
        if name and conditions not in ("auto", setting):
            raise ConfigError(f"conditions = {conditions!r} beside the column {name!r}: expected {setting!r} or 'auto'")
    for name in filter(None, (image, caption, label)):
        if name not in table.names:
            raise unknown(f"column of {where}", name, table.names)
    pictured = image or one_of(table, IMAGE, "image")
    if caption or label:
        return Roles(pictured, caption or label, "captions" if caption else "classes")
    if conditions == "none":
        return Roles(pictured, "", "none")
    for kind, known, setting in (("captions", CAPTION, "caption"), ("classes", LABEL, "label")):
        if conditions in ("auto", kind) and any(name.lower() in known for name in table.names):
            return Roles(pictured, one_of(table, known, setting), kind)
    raise ConfigError(
        f"{where} has the columns {_list(table.names)}: expected captions ({', '.join(CAPTION)}) or classes "
        f"({', '.join(LABEL)}), or caption='NAME', label='NAME' or conditions='none'"
    )


def split_of(table: Columns) -> str:
    """The column of the splits by its usual name, in any case; "" for none.

    Raises:
        ConfigError: several that could be meant.
    """
    return one_of(table, SPLIT, "split_column") if any(name.lower() in SPLIT for name in table.names) else ""


def one_of(table: Columns, known: tuple[str, ...], setting: str, settable: bool = True) -> str:
    """The one column of these usual names, in any case; ``settable`` is whether ``setting`` could name another.

    Raises:
        ConfigError: there is none, or several.
    """
    found = [name for name in table.names if name.lower() in known]
    if len(found) == 1:
        return found[0]
    what = f"several that may be the {setting}: {_list(found)}" if found else f"the columns {_list(table.names)}"
    hint = "" if len(table.names) > 1 else " (and perhaps delimiter='...')"
    expected = f"one of {', '.join(known)}" if not found else "one"
    other = f", or {setting}='NAME'{hint}" if settable else ""
    raise ConfigError(f"{str(table.file)!r} has {what}: expected {expected}{other}")


def _list(names: list[str]) -> str:
    shown = [repr(name[:40]) for name in names[:12]]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
