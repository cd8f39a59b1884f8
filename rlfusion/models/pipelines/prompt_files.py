"""Files of prompts as the field keeps them: lines of text, CSV and TSV tables, JSON, JSON lines, Parquet.

    .txt      one prompt a line; blank lines are none
    .csv      a header, then rows, quoted as RFC 4180 says; .tsv the same with tabs. A .tsv that is not well formed with
              such quotes has none: a quote is then a character like others (PartiPrompts)
    .jsonl    an object or a text a line; .ndjson the same
    .json     a list of texts or objects, one such list under a usual name, or COCO's captions ("annotations")
    .parquet  the columns that JSON can hold; others are left out, and named

The column of prompts is the one of a usual name (``USUAL``, upper or lower case) unless told. A column ``negative`` or
``negative_prompt`` has negative prompts. All other columns are metadata.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.models.pipelines.prompt_encoding import decoded

LONGEST_FIELD = 2**24
USUAL = (("prompt", "prompts"), ("caption", "captions", "text", "texts", "description"))
"""Usual names of the column of prompts: one of the first group, else one of the second, never two of a group."""
HEADERS = {"prompt", "prompts", "caption", "captions"}
"""What the first line of a table has among its columns, and of a list of prompts hardly."""
NEGATIVE = ("negative", "negative_prompt", "negative_prompts")
NEWLINE = re.compile(r"\r\n|\r|\n")
LISTED = 12
Rows = Iterable[tuple[int, Any]]
"""Numbered rows: each a text or an object."""


@dataclass
class Table:
    """What a file holds: numbered rows, each a dict; which key is the prompt, and which keys may be the negative one.

    ``unit`` says what the numbers count; ``notes`` what was left out.
    """

    rows: Iterable[tuple[int, dict[str, Any]]]
    column: str
    negatives: Sequence[str] = ()
    unit: str = "line"
    notes: list[str] = field(default_factory=list)


def read_table(path: Path, name: str, column: str, encoding: str) -> Table:
    """The table in the file at ``path``, which messages call ``name``.

    Raises:
        ConfigError: the file cannot be read, or is not what its suffix says.
    """
    where = f"prompts = {name!r}"
    try:
        return READERS[path.suffix.lower()](path, where, column, encoding)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or error}") from error


def _text(path: Path, where: str, column: str, encoding: str) -> Table:
    if column:
        raise ConfigError(f"prompt_column = {column!r}: {where} has no columns, expected none")
    text = decoded(path, where, encoding)
    if kind := _other_kind(text):
        raise ConfigError(
            f"{where}: what a {kind} file holds is no text of one prompt a line: expected its name to end so"
        )
    lines = enumerate(NEWLINE.split(text), 1)
    return Table(((number, {"": line}) for number, line in lines if line.strip()), "")


def _holds(text: str, kind: Any) -> bool:
    """Whether a text is JSON of this kind."""
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


def _other_kind(text: str) -> str:
    """The suffix that a text of another form than one prompt a line should have; "" for prompts."""
    first = next((line.strip() for line in NEWLINE.split(text) if line.strip()), "")
    if _holds(first, dict):
        return ".json" if _holds(text, dict) else ".jsonl"
    if first[:1] in ("[", "{") and _holds(text, list | dict):
        return ".json"
    for delimiter, suffix in (("\t", ".tsv"), (",", ".csv"), (";", ".csv")):
        names = [name.strip().strip('"').lower() for name in first.split(delimiter)]
        if len(names) > 1 and set(names) & HEADERS and all(re.fullmatch(r"[\w-]*( [\w-]+)?", name) for name in names):
            return suffix
    return ""


def _separated(delimiter: str) -> Callable[[Path, str, str, str], Table]:
    def reader(path: Path, where: str, column: str, encoding: str) -> Table:
        text = decoded(path, where, encoding)
        try:
            rows = list(_records(text, where, delimiter, quoted=True))
        except ConfigError:
            if delimiter != "\t":
                raise
            rows = list(_records(text, where, delimiter, quoted=False))
        if not rows:
            raise ConfigError(f"{where}: the file holds no prompt")
        header = rows[0][1]
        if twice := sorted({title for title in header if header.count(title) > 1}):
            raise ConfigError(f"{where}: two columns are named {twice[0]!r}, expected distinct names in the first row")
        key, negatives = _columns(header, where, column)
        return Table(((number, dict(zip(header, row))) for number, row in rows[1:]), key, negatives)

    return reader


def _records(text: str, where: str, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table by the line that each begins in, blank lines left out; all as long as the first, cells
    without the blanks around them.

    Raises:
        ConfigError: a quote out of place, or a row of another length.
    """
    style = {"strict": True, "skipinitialspace": True} if quoted else {"quoting": csv.QUOTE_NONE}
    reader, line, width = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **style), 1, 0
    while True:
        before = csv.field_size_limit(LONGEST_FIELD)  # it is of the process: others have limits of their own
        try:
            row = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise ConfigError(f"{where}, line {line}: no well-formed row ({error})") from error
        finally:
            csv.field_size_limit(before)
        if len(row) > 1 or any(row):
            width = width or len(row)
            if len(row) != width:
                raise ConfigError(
                    f"{where}, line {line}: {len(row)} fields, the first row has {width}: expected as many "
                    f"(a field with {delimiter!r} in it needs quotes)"
                )
            yield line, row
        line = reader.line_num + 1


def _columns(names: Sequence[str], where: str, column: str) -> tuple[str, list[str]]:
    """The column of the prompts, and those of negative ones, one at most.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if column and column not in names:
        raise ConfigError(f"prompt_column: {unknown(f'column of {where}', column, names)}")
    groups = [[name for name in names if name.lower() in group] for group in USUAL]
    fits = [column] if column else next(filter(None, groups), [])
    if len(fits) != 1:
        what = (
            f"the columns {named(fits)} could all be the prompt" if fits else f"no column of prompts in {named(names)}"
        )
        raise ConfigError(
            f"{where}: {what}: expected pipeline.prompt_column to say which (usual: {', '.join(USUAL[0])})"
        )
    negatives = [name for name in names if re.sub("[ -]", "_", name.lower()) in NEGATIVE and name != fits[0]]
    if len(negatives) > 1:
        raise ConfigError(f"{where}: the columns {named(negatives)} could all be the negative prompt, expected one")
    return fits[0], negatives


def named(names: Sequence[str]) -> str:
    """Names in a line."""
    return ", ".join(map(repr, names[:LISTED])) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _json_lines(path: Path, where: str, column: str, encoding: str) -> Table:
    lines = enumerate(NEWLINE.split(decoded(path, where, encoding)), 1)
    rows = ((number, _json(line, f"{where}, line {number}")) for number, line in lines if line.strip())
    return _of_rows(rows, where, column, "line")


def _json_file(path: Path, where: str, column: str, encoding: str) -> Table:
    held = _json(decoded(path, where, encoding), where)
    if isinstance(held, dict):
        lists = {key: value for key, value in held.items() if isinstance(value, list)}
        usual = [key for key in lists if key.lower() in (*chain(*USUAL), "annotations")]
        if len(usual) != 1:
            raise ConfigError(
                f"{where}: an object of {named(list(held))}: expected a list of prompts or of objects with one, or one "
                "such list under a usual name (prompts, captions, annotations)"
            )
        held = lists[usual[0]]
    if not isinstance(held, list):
        raise ConfigError(f"{where}: {type(held).__name__}: expected a list of prompts or of objects with one")
    return _of_rows(enumerate(held, 1), where, column, "item")


def _of_rows(rows: Rows, where: str, column: str, unit: str) -> Table:
    """The table of rows that are all texts, or all objects with a prompt."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"{where}: the file holds no prompt")
    rows, kind = chain([first], rows), type(first[1])
    if kind is str and not column:
        key = ""
    elif kind is dict:
        key, _ = _columns(list(first[1]), f"{where}, {unit} {first[0]}", column)
    else:
        expected = f"objects with a {column!r}" if column else "texts, or objects with a prompt"
        raise ConfigError(f"{where}, {unit} {first[0]}: {kind.__name__}: expected {expected}")

    def checked() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in rows:
            if type(row) is not kind or (kind is dict and key not in row):
                expected = f"an object with {key!r}" if kind is dict else "a text"
                raise ConfigError(f"{where}, {unit} {number}: expected {expected}, as in {unit} {first[0]}")
            yield number, row if kind is dict else {"": row}

    return Table(checked(), key, NEGATIVE if kind is dict else (), unit)


def _json(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        message = "nested too deep" if isinstance(error, RecursionError) else str(error)
        hint = ": several values, one a line, are a .jsonl" if message.startswith("Extra data") else ""
        raise ConfigError(f"{where}: no JSON ({message}){hint}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) != len(pairs):
        raise ValueError("an object has a key twice")
    return held


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_number)


def _parquet(path: Path, where: str, column: str, encoding: str) -> Table:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{where}: a .parquet needs pyarrow, expected pip install pyarrow") from error
    if encoding:
        raise ConfigError(f"encoding = {encoding!r}: {where} says its own, expected none")
    try:
        kinds = {name: _held(arrow, kind) for name, kind in _schema(parquet.read_schema(path), where).items()}
        kept = [name for name, kind in kinds.items() if kind]
        key, negatives = _columns(kept, where, column)
        table = parquet.read_table(path, columns=kept)
        texts = [table.schema.get_field_index(name) for name in kept if kinds[name] == "as text"]
        for i in texts:
            table = table.set_column(i, table.schema.names[i], table.column(i).cast(arrow.string()))
    except arrow.ArrowException as error:
        raise ConfigError(f"{where}: no readable .parquet ({str(error).splitlines()[0]})") from error
    left = sorted(kinds.keys() - set(kept))
    rows = enumerate((_without_nan(row) for row in table.to_pylist()), 1)
    return Table(rows, key, negatives, "row", [f"left out, as JSON cannot hold them: {named(left)}"] if left else [])


def _schema(schema: Any, where: str) -> dict[str, Any]:
    if len(set(schema.names)) != len(schema.names):
        raise ConfigError(f"{where}: two columns have the same name, expected distinct names")
    return {name: schema.field(name).type for name in schema.names}


def _held(arrow: Any, kind: Any) -> str:
    """How a column's type is kept: "as it is", "as text" (times, decimals), or "" for not at all (bytes, maps)."""
    t = arrow.types
    if any(is_(kind) for is_ in (t.is_boolean, t.is_integer, t.is_floating, t.is_string, t.is_large_string, t.is_null)):
        return "as it is"
    if t.is_temporal(kind) or t.is_decimal(kind):
        return "as text"
    if t.is_dictionary(kind):
        return _held(arrow, kind.value_type)
    inside = [kind.value_type] if t.is_list(kind) or t.is_large_list(kind) else []
    inside = [kind.field(i).type for i in range(kind.num_fields)] if t.is_struct(kind) else inside
    return "as it is" if inside and all(_held(arrow, one) == "as it is" for one in inside) else ""


def _without_nan(value: Any) -> Any:
    """NaN, which is how tables say that nothing is there, as None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


READERS: dict[str, Callable[[Path, str, str, str], Table]] = {
    ".txt": _text,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".json": _json_file,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
"""The kinds of files, by suffix (upper or lower case)."""
