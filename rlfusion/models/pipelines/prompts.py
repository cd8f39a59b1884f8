"""Prompts: what a text-to-image model is asked for, what guidance leads it away from, and what else is known of each.

A text is a prompt, or the name of a file of them (``prompt_files`` reads these). It is the name of a file if

    (1)  it ends as a table does (``READERS``), or something of that name exists
    (2)  it begins with /, ./, ../, ~ or a drive's letter, or is one word with a slash, or one word that ends in a
         suffix (a dot, a letter, up to eleven more letters or digits)

A name without a file, a folder, or a file of another kind is an error, never a prompt. A prompt that looks like a
name goes into a file of one line. Each row of a file is a prompt of its own, also where its text comes again.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.common.notices import say_once
from rlfusion.models.pipelines.prompt_files import READERS, Table, named, read_table

Metadata = Mapping[str, Any]
PATH = re.compile(r"(?s)(?:/|\.\.?[/\\]|~\S*/|[A-Za-z]:[/\\]).*|\S*[/\\]\S*|\S+\.[A-Za-z][A-Za-z0-9]{0,11}")
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
EXPECTED = f"expected a prompt, or a file of them: {', '.join(READERS)}"
ONE_LINE = "a prompt that looks like a path goes into a .txt of one line"
SHOWN = 60
BLOCK = 1000


@dataclass(frozen=True)
class Prompts:
    """Prompts, the negative prompt of each ("" for none), and the further columns of each (``()`` for none).

    Attributes:
        texts: (P,), repeats among them where a file has several rows of one text.
        negatives: (P,).
        metadata: (P,) mappings of JSON values by column, or empty.
    """

    texts: tuple[str, ...]
    negatives: tuple[str, ...]
    metadata: tuple[Metadata, ...] = ()

    def __post_init__(self) -> None:
        if not self.texts or len(self.texts) != len(self.negatives):
            raise ConfigError(f"{len(self.texts)} prompts, {len(self.negatives)} negative ones: expected one for each")
        if self.metadata and len(self.metadata) != len(self.texts):
            raise ConfigError(
                f"{len(self.texts)} prompts, {len(self.metadata)} rows of metadata: expected one for each"
            )

    @cached_property
    def sha256(self) -> str:
        """The digest of all that was read: another one says that a file was edited."""
        digest = hashlib.sha256()
        for i in range(0, len(self.texts), BLOCK):
            parts = (held[i : i + BLOCK] for held in (self.texts, self.negatives, self.metadata))
            digest.update(json.dumps(list(parts), sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def read(text: str, negative: str = "", column: str = "", encoding: str = "") -> Prompts:
    """The prompts that ``text`` is or names.

    Args:
        text: a prompt, or the name of a file.
        negative: the negative prompt of those that have none of their own.
        column: of a table, the column of the prompts; empty finds it by its usual names.
        encoding: of a file; empty for UTF-8, or UTF-16 or UTF-32 where its first bytes say so.

    Raises:
        ConfigError: a name without a file, a file of another kind, nothing in it, or a row that is no prompt.
    """
    text = text.strip()
    path = _named_file(text)
    if path is None:
        if column or encoding:
            raise ConfigError(
                f"prompt_column, encoding = {column!r}, {encoding!r}: prompts = {_short(text)} is no file"
            )
        if re.search(r"[\r\n]", text):
            raise ConfigError(f"prompts = {_short(text)}: a line break in a prompt, expected one prompt or a file")
        return Prompts((_clean(text, "prompts"),), (negative,))
    stat = path.stat()
    return _of_file(path, (stat.st_mtime_ns, stat.st_size, stat.st_ino), text, negative, column, encoding)


@lru_cache(maxsize=2)
def _of_file(path: Path, stamp: tuple[int, ...], text: str, negative: str, column: str, encoding: str) -> Prompts:
    """The prompts of a file of this time, size and number on its disk: one command asks for them several times."""
    table = read_table(path, text, column, encoding)
    prompts = _of_table(table, text, negative)
    _say(table, prompts, text)
    return prompts


def _named_file(text: str) -> Path | None:
    """The file that a text names; None for a prompt.

    Raises:
        ConfigError: it names none that can be read.
    """
    if not text:
        return None
    path = _expanded(text)
    known = path.suffix.lower() in READERS
    if not _exists(path):
        if known or PATH.fullmatch(text):
            raise ConfigError(f"prompts = {_short(text)}: there is no such file{_near(path)} ({EXPECTED}; {ONE_LINE})")
        return None
    if path.is_dir():
        raise ConfigError(f"prompts = {text!r} is a folder: {EXPECTED} ({ONE_LINE})")
    if not path.is_file():
        raise ConfigError(f"prompts = {text!r} is no regular file: {EXPECTED}")
    if not known:
        raise ConfigError(f"prompts = {text!r} is a file of another kind: {EXPECTED} ({ONE_LINE})")
    return path


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        return False


def _near(path: Path) -> str:
    """The nearest name of a file that is there, or which folder is not."""
    if not _exists(path.parent) and path.parent != Path("."):
        return f", nor a folder {_short(str(path.parent))}"
    try:
        names = [found.name for found in path.parent.iterdir() if found.is_file()]
    except OSError:
        names = []
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(path.name[:255].lower(), lower, n=1)
    return f"; did you mean {str(path.parent / lower[near[0]])!r}?" if near else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _clean(text: Any, where: str) -> str:
    """A prompt without the blanks around it.

    Raises:
        ConfigError: it is no text, blank, or holds a control character.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{where}: the prompt is {_short(str(text))} ({type(text).__name__}), expected a text")
    text = text.strip()
    if not text:
        raise ConfigError(f"{where}: the prompt is blank, expected a text")
    _require_printable(text, where)
    return text


def _require_printable(text: str, where: str) -> None:
    if found := CONTROLS.search(text):
        raise ConfigError(
            f"{where}: the prompt holds the control character U+{ord(found[0]):04X} ({_short(text)}): "
            "expected text; is it of another encoding (pipeline.encoding, such as utf-16-le or cp1252)?"
        )


def _of_table(table: Table, name: str, negative: str) -> Prompts:
    texts, negatives, metadata = [], [], []
    where = f"prompts = {name!r}, {table.unit}"
    for number, row in table.rows:
        text = row.pop(table.column)
        if type(text) is not str or not text.isprintable() or not (text := text.strip()):
            text = _clean(text, f"{where} {number}")
        own = [row.pop(key) for key in table.negatives if key in row]
        texts.append(text)
        negatives.append(_negative(own, f"{where} {number}") if own else negative)
        metadata.append(row)
    if not texts:
        raise ConfigError(f"prompts = {name!r}: the file holds no prompt")
    return Prompts(tuple(texts), tuple(negatives), tuple(metadata) if any(metadata) else ())


def _negative(own: list[Any], where: str) -> str:
    """The one negative prompt of a row."""
    text = own[0]
    if len(own) > 1 or not isinstance(text, str):
        raise ConfigError(f"{where}: the negative prompt is {_short(str(own)[1:-1])}: expected one text")
    _require_printable(text, where)
    return text.strip()


def _say(table: Table, prompts: Prompts, name: str) -> None:
    """One line on what is not plain to see in a file: repeats, metadata, columns that are left out."""
    parts, distinct = [], len(set(prompts.texts))
    if distinct < len(prompts.texts):
        parts.append(f"{len(prompts.texts):,} rows of {distinct:,} distinct prompts, each row a prompt of its own")
    columns = sorted({key for row in prompts.metadata for key in row})
    if columns:
        parts.append(f"column {table.column!r} is the prompt, metadata are {named(columns)}")
    parts += table.notes
    if parts:
        say_once(f"prompts = {name!r}: {'; '.join(parts)}")
