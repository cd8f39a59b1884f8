"""The files below a folder: images, captions and tables beside them, and what else lies there, counted."""

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rlfusion.common.errors import ConfigError
from rlfusion.data.images import suffixes

CAPTIONS = (".txt", ".caption")
METADATA = {f"metadata{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")}
OF_SYSTEMS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
FILES_OF_SYSTEMS = {"thumbs.db", "desktop.ini"}


@dataclass
class Files:
    """``images`` in the order of their paths; ``captions`` the files of the same name beside an image; ``metadata`` the
    tables; ``left``: everything else, counted by what it is.
    """

    images: list[Path] = field(default_factory=list)
    captions: dict[Path, Path] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)


def files_below(root: Path) -> Files:
    """All files below ``root``; links to folders are followed, except back to a folder above.

    Raises:
        ConfigError: a folder that cannot be listed, an image that is no regular file, or two captions of one image.
    """
    found, texts = Files(), []
    for folder, names in _walk(root, found.left):
        for name in names:
            file, suffix = folder / name, Path(name).suffix.lower()
            if hidden(name):
                found.left["hidden"] += 1
            elif suffix in suffixes():
                require_regular(file)
                found.images.append(file)
            elif name.lower() in METADATA:
                found.metadata.append(file)
            elif suffix in CAPTIONS:
                texts.append(file)
            else:
                found.left[suffix or "without a suffix"] += 1
    found.images.sort()
    found.metadata.sort()
    _pair(found, sorted(texts))
    return found


def hidden(name: str) -> bool:
    """What a system or a program left there: ``.ipynb_checkpoints``, ``.DS_Store``, ``._a.png``, ``__MACOSX``."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS | FILES_OF_SYSTEMS


def require_regular(file: Path, what: str = "image") -> None:
    """
    Raises:
        ConfigError: nothing there (a broken link), or a pipe or device, which a read would wait for.
    """
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{what} {str(file)!r} cannot be read: {error.strerror}") from error
    if not regular:
        raise ConfigError(f"{what} {str(file)!r} is no regular file")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _walk(root: Path, left: Counter[str]) -> list[tuple[Path, list[str]]]:
    """Every folder that is looked into, with the names of its files."""
    found, waiting = [], [(root, frozenset[tuple[int, int]]())]
    while waiting:
        folder, above = waiting.pop()
        try:
            about = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(f"folder {str(folder)!r} cannot be read: {error.strerror}") from error
        here = above | {(about.st_dev, about.st_ino)}
        folders = [entry for entry in entries if _is_folder(entry)]
        found.append((folder, [entry.name for entry in entries if entry not in folders]))
        for entry in folders:
            inside = entry.stat()
            if hidden(entry.name):
                left["hidden folders"] += 1
            elif (inside.st_dev, inside.st_ino) in here:
                left["links back to a folder above"] += 1
            else:
                waiting.append((folder / entry.name, here))
    return found


def _pair(found: Files, texts: list[Path]) -> None:
    """Texts that have the name of an image beside them are its caption; the others are left out."""
    images: dict[Path, list[Path]] = {}
    for image in found.images:
        images.setdefault(image.with_suffix(""), []).append(image)
    for text in texts:
        owners = images.get(text.with_suffix(""), [])
        if not owners:
            found.left[text.suffix.lower()] += 1
        for image in owners:
            if image in found.captions:
                other = found.captions[image].name
                raise ConfigError(f"image {str(image)!r} has two captions, {other!r} and {text.name!r}: expected one")
            found.captions[image] = text
