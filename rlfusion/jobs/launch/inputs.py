"""The files that settings name, for a job elsewhere: what travels, and how the settings call it there.

    path/to/file.py:Name                 anywhere in the settings: the file
    data, pretrain.data, ...             a data set's file or folder; of a table the folder that it lies in
    base, teacher, autoencoder           the folder of the model alone, of a run
    pipeline.prompts                     the file
    pipeline.adapters, lora              the file, or peft's folder
    reward_options, Name(path='...')     a text that begins with /, ./, ../ or ~/, or that is there

What lies below a folder that the nodes share is left there. All else is copied to ``root/cache/inputs``, below the
SHA-256 of what it holds, so that a run that is resumed later, from wherever, finds the same bytes under the same name.
"""

import hashlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlfusion.common import spec
from rlfusion.common.code_files import PLACED
from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten
from rlfusion.data import columns, sources
from rlfusion.models import pipelines
from rlfusion.models.pipelines.prompt_files import READERS

FOLDER = "inputs"
MOST_BYTES = 90 * 2**20
"""What the dashboard of a Ray cluster takes in one piece is 100 MiB."""
PATH = re.compile(r"(/|\.\.?/|~/).+")
MODULE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.\w+)*):\w+\s*(\(.*)?", re.DOTALL)
NAMED = re.compile(r"[\w.:/-]+\(.*\)\s*", re.DOTALL)


@dataclass
class Inputs:
    """What travels.

    Attributes:
        root: the folder of all runs, on the cluster.
        shared: folders that are the same here and there.
        files: what each file holds, by its path below ``root/cache``.
        modules: the modules of the user's own code that settings name, and where they are here; they do not travel.
    """

    root: Path
    shared: tuple[Path, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)

    def translated(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings, plain data, with what they name where it will be.

        Raises:
            ConfigError: a file that is not there, or more than can travel.
        """
        return {name: self._value(name, value) for name, value in settings.items()}

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {self._text("", k): self._value(f"{key}.{k}", held) for k, held in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(key, held) for held in value]
        return self._text(key, value) if isinstance(value, str) else value

    def _text(self, key: str, text: str) -> str:
        if named := PLACED.fullmatch(text):
            return f"{self._there(key, Path(named['file']))}:{self._called(key, named['rest'])}"
        leaf = key.rpartition(".")[2]
        if text and leaf in KEYS:
            return KEYS[leaf](self, key, text)
        if module := MODULE.fullmatch(text):
            self._note_module(module["module"])
        if NAMED.fullmatch(text):
            return self._called(key, text)
        return self._path(key, text) if key.startswith("reward_options.") else text

    def _called(self, key: str, text: str, move: Callable[[str, str], str] | None = None) -> str:
        """``Name(path='...', ...)`` with the paths in it where they will be; any other text as it is."""
        try:
            name, settings = spec.split(text)
        except ConfigError:
            return text
        move = move or self._path
        moved = {k: move(f"{key}: {k}", v) if isinstance(v, str) else v for k, v in settings.items()}
        return text if moved == settings else f"{name}({', '.join(f'{k}={v!r}' for k, v in moved.items())})"

    def _path(self, key: str, text: str) -> str:
        """A text that may be a path: one that says so must be there."""
        looks_like = os.sep in text or Path(text).suffix
        if not text or not (PATH.fullmatch(text) or (looks_like and _exists(text))):
            return text
        return self._there(key, Path(text).expanduser())

    def _data(self, key: str, text: str) -> str:
        """A data set."""
        if text == sources.DIGITS:
            return text
        sources.source(text)  # refuses what is nowhere
        return self._called(key, text, self._data_path) if not _exists(text) else self._data_path(key, text)

    def _data_path(self, key: str, text: str) -> str:
        """Where a data set's file or folder will be; a table with its folder, as its images lie beside it."""
        if not _exists(text):
            return self._path(key, text)
        path = Path(text).absolute()
        table = path.suffix.lower() in columns.SUFFIXES and path.is_file()
        return f"{self._there(key, path.parent)}/{path.name}" if table else self._there(key, path)

    def _model(self, key: str, text: str) -> str:
        """A model: by its folder, or by a name on the hub."""
        if not _exists(text) and pipelines.is_pipeline(text):
            return text
        inside = [Path(text) / part for part in PARTS if (Path(text) / part).is_file()]
        return self._there(key, inside[0].parent if inside else Path(text))

    def _prompts(self, key: str, text: str) -> str:
        """Prompts: one in words, or a file."""
        path = Path(text.strip()).expanduser()
        return self._there(key, path) if path.suffix.lower() in READERS else text

    def _adapters(self, key: str, text: str) -> str:
        """Files of adapters, each with its strength."""
        held = pipelines.parse_adapters(text)
        return ",".join(f"{self._there(key, Path(one.file))}:{one.scale!r}" for one in held)

    def _lora(self, key: str, text: str) -> str:
        """Adapters that are trained, which may begin as those of a file."""
        return self._called(key, pipelines.recorded_lora(text))

    def _there(self, key: str, path: Path) -> str:
        """Where a file or folder will be.

        Raises:
            ConfigError: it is not here and not shared, or too large.
        """
        path = path.absolute()
        if any(path.resolve().is_relative_to(place) or path.is_relative_to(place) for place in self.shared):
            return str(path)
        if not _exists(path):
            raise ConfigError(
                f"{key} = {shorten(repr(str(path)), LONGEST_PATH)} does not exist here: expected a file or folder, or "
                "one below --shared FOLDER, where the nodes of the cluster find it"
            )
        held = {name: file.read_bytes() for name, file in self._walk(key, path)}
        digest = hashlib.sha256("".join(f"{n}\0{_sha256(held[n])}\n" for n in sorted(held)).encode()).hexdigest()[:16]
        self.files |= {f"{FOLDER}/{digest}/{name}": content for name, content in held.items()}
        return str(self.root / "cache" / FOLDER / digest / path.name)

    def _walk(self, key: str, path: Path) -> Iterator[tuple[str, Path]]:
        """(name, file) of a file, or of all files of a folder.

        Raises:
            ConfigError: they are more than can travel.
        """
        size = sum(map(len, self.files.values()))
        for name, file in [(path.name, path)] if path.is_file() else _files(path):
            size += file.stat().st_size
            if size > MOST_BYTES:
                raise ConfigError(
                    f"{key} = {shorten(repr(str(path)), LONGEST_PATH)}: more than {MOST_BYTES >> 20} MiB would have to "
                    "travel: expected it on storage that the nodes share, below --shared FOLDER"
                )
            yield name, file

    def _note_module(self, module: str) -> None:
        """Note a module that is no part of Python, of rlfusion or of an installed package."""
        top = module.partition(".")[0]
        found = importlib.util.find_spec(top) if top != "rlfusion" else None
        origin = found.origin or next(iter(found.submodule_search_locations or ()), "") if found else ""
        paths = sysconfig.get_paths()
        libraries = [Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")]
        if origin and not any(Path(origin).resolve().is_relative_to(place) for place in libraries):
            self.modules[module] = origin


PARTS = ("model/model.json", "autoencoder/autoencoder.json")
"""Of a run's folder, what says that the model is in a folder inside."""

KEYS: dict[str, Callable[[Inputs, str, str], str]] = {
    "data": Inputs._data,
    "prompts": Inputs._prompts,
    "adapters": Inputs._adapters,
    "lora": Inputs._lora,
    **dict.fromkeys(("base", "teacher", "autoencoder"), Inputs._model),
}
"""The settings that name files, by the last word of their name."""


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a text that no path can be
        return False


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path from the folder's own name on, file) of every file in it, links followed, but none back to above."""
    for place, folders, names in os.walk(folder, followlinks=True):
        above = {Path(place).resolve(), *Path(place).resolve().parents}
        folders[:] = sorted(name for name in folders if (Path(place) / name).resolve() not in above)
        for name in sorted(names):
            if (file := Path(place) / name).is_file():
                yield (Path(folder.name) / file.relative_to(folder)).as_posix(), file


def _sha256(held: bytes) -> str:
    return hashlib.sha256(held).hexdigest()
