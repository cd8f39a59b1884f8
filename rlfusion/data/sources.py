"""Finds the source that a text names: "digits", a folder, a file by its suffix, or a source with its settings."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlfusion.common import spec
from rlfusion.common.code_files import absolute as of_file
from rlfusion.common.code_files import label
from rlfusion.common.errors import ConfigError
from rlfusion.common.registry import Registry
from rlfusion.common.user_code import running
from rlfusion.data.columns import SUFFIXES
from rlfusion.data.dataset import Dataset, digits
from rlfusion.data.folder import Folder
from rlfusion.data.npz import Npz
from rlfusion.data.table import Table

DIGITS = "digits"
SIZE = 32
"""Pixels of a side that images are brought to, unless told."""
_PLACES = {"folder": "folder:Folder", "npz": "npz:Npz", "table": "table:Table", "hf": "hub:HF"}
SOURCES = Registry("data source", "rlfusion.data", {name: f"rlfusion.data.{place}" for name, place in _PLACES.items()})


def load(data: str, size: int = SIZE, say: Callable[[str], None] | None = None) -> Dataset:
    """A data set by name or path: "digits", a folder of images (brought to ``size``), an ``.npz``, a table (``.csv``,
    ``.tsv``, ``.jsonl``, ``.parquet``), or a source with settings: ``folder(path='...', split='train')``, ``npz(...)``,
    ``table(...)``, ``hf(...)``. ``say`` is told in one line what was read and what was left out.

    Raises:
        ConfigError: nothing there, or something that cannot be read or be understood in one way.
    """
    if data == DIGITS:
        return _of_size(digits(), data, size)
    found = _of_size(_loaded(data, source(data), size), data, size)
    if say is not None:
        message = "".join(c if c.isprintable() else "?" for c in found.summary)
        say(f"data {data!r}: {message}")
    return found


def _of_size(found: Dataset, data: str, size: int) -> Dataset:
    """Data that have the size that was asked for, or were not asked.

    Raises:
        ConfigError: they have a size of their own, and another one was asked for.
    """
    sides = found.shape[1:]
    if size != SIZE and any(side != size for side in sides):
        raise ConfigError(
            f"size = {size}: data {data!r} are {'x'.join(map(str, sides))} as they are, expected no size (images of a "
            "folder or a table are brought to one)"
        )
    return found


def _loaded(data: str, made: Any, size: int) -> Dataset:
    """The data of a source; a function may make them at once.

    Raises:
        ConfigError: a stranger's source, or what it loads, is something else.
        UserCodeError: a stranger's source raises.
    """
    if isinstance(made, Dataset):
        return made
    if not callable(getattr(made, "load", None)):
        raise ConfigError(
            f"data = {data!r} makes {type(made).__name__}: expected rlfusion.data.Dataset, or what has load(size)"
        )
    with running(f"data {data!r}"):
        found = made.load(size)
    if not isinstance(found, Dataset):
        raise ConfigError(f"data = {data!r} loads {type(found).__name__}: expected rlfusion.data.Dataset")
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
    place = ":" in data and "://" not in data
    if not exists and ("(" in data or place or data in SOURCES.names()):
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


def absolute(data: str) -> str:
    """What ``data`` names, with the paths in it from the root on, so that it is found from another folder too."""
    if "(" not in data or Path(data).exists():
        return str(Path(data).absolute()) if data != DIGITS and Path(data).exists() else of_file(data)
    name, settings = spec.split(of_file(data))
    there = {k: v for k, v in settings.items() if k in ("path", "root") and isinstance(v, str) and v}
    moved = {k: str(Path(v).absolute()) for k, v in there.items() if Path(v).exists()}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in {**settings, **moved}.items())})"


def missing(data: str) -> str:
    """The path that ``data``, as ``absolute`` gives it, names and that is not there; "" for none."""
    whole = "(" not in data or Path(data).is_absolute()
    settings = {"path": data} if whole else spec.split(data)[1]
    paths = [v for k, v in settings.items() if k in ("path", "root") and isinstance(v, str) and Path(v).is_absolute()]
    named = [v.partition(":")[0] for v in paths if not Path(v).exists()]
    return next((v for v in named if not Path(v).exists()), "")


def _expected() -> str:
    return (
        f"'digits', a folder of images, a file ({', '.join(('.npz', *SUFFIXES))}), or {', '.join(SOURCES)}(path='...')"
    )


def name_of(data: str) -> str:
    """A short name of ``data``, for the folder of a run: that of its folder or file."""
    if Path(data).exists() or not ("(" in data or ":" in data):
        return Path(data).stem
    name, settings = label(data), spec.split(data)[1]
    return Path(str(settings.get("path", name))).stem
