"""Finds the source that a text names: "digits", a folder, a file by its suffix, or a source with its settings."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.data.columns import SUFFIXES
from rlfusion.data.dataset import Dataset, digits
from rlfusion.data.folder import Folder
from rlfusion.data.hub import HF
from rlfusion.data.npz import Npz
from rlfusion.data.table import Table

DIGITS = "digits"
SOURCES = {"folder": Folder, "npz": Npz, "table": Table, "hf": HF}


def load(data: str, size: int = 32, say: Callable[[str], None] | None = None) -> Dataset:
    """A data set by name or path: "digits", a folder of images (brought to ``size``), an ``.npz``, a table (``.csv``,
    ``.tsv``, ``.jsonl``, ``.parquet``), or a source with settings: ``folder(path='...', split='train')``, ``npz(...)``,
    ``table(...)``, ``hf(...)``. ``say`` is told in one line what was read and what was left out.

    Raises:
        ConfigError: nothing there, or something that cannot be read or be understood in one way.
    """
    if data == DIGITS:
        return digits()
    found = source(data).load(size)
    if say is not None:
        message = "".join(c if c.isprintable() else "?" for c in found.summary)
        say(f"data {data!r}: {message}")
    return found


def source(data: str) -> Any:
    """The source that ``data`` names, with its settings.

    Raises:
        ConfigError: no source, no such setting, or no folder or file.
    """
    path = Path(data)
    try:
        folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"data = {data[:80]!r}: {error.strerror if isinstance(error, OSError) else error}") from error
    if not exists and "(" in data:
        return spec.parse(data, SOURCES, "data source")
    if folder and data:
        return Folder(data)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return Npz(data)
    if suffix in SUFFIXES:
        return Table(data)
    if exists:
        raise ConfigError(f"data = {data!r}: expected {_expected()}")
    near = f"; did you mean {DIGITS!r}?" if difflib.get_close_matches(data, [DIGITS]) else ""
    raise ConfigError(f"data = {data!r} does not exist: expected {_expected()}{near}")


def _expected() -> str:
    return (
        f"'digits', a folder of images, a file ({', '.join(('.npz', *SUFFIXES))}), or {', '.join(SOURCES)}(path='...')"
    )


def name_of(data: str) -> str:
    """A short name of ``data``, for the folder of a run: that of its folder or file."""
    if "(" not in data or Path(data).exists():
        return Path(data).stem
    name, settings = spec.split(data)
    return Path(str(settings.get("path", name))).stem
