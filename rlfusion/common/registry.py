"""One way to name a thing that is one file: an agent, a kernel, a network, a reward, ...

A name is

    short           a row of the table of what is built in, or an entry point of the group, of an installed package
    module:Name     package.module:Name, of anything that Python can import
    file.py:Name    path/to/file.py:Name, of a file that need not be installed

A file is found from the working directory, and is written down with its path from the root (``absolute``), so that a
process elsewhere finds it too. SHA-256 of its bytes goes with it (``files_of``), so that an edited file is noticed. A
worker on another machine gets the file's text (``texts_of``, ``receive``); nothing is ever unpickled.
"""

import hashlib
import importlib
import inspect
import linecache
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from rlfusion.common.errors import ConfigError, near, unknown
from rlfusion.common.user_code import loading

BUILT_IN, ABSENT = "built in", "absent"
FORMS = "package.module:name, path/to/file.py:name"
PLACED = re.compile(r"\s*(?![^('\"]*\s=\s)(?P<file>[^()'\"\n]+\.py):(?P<rest>\w+\s*(\(.*)?)", re.DOTALL)
"""A text that names a thing in a file, with settings or without."""


class Found(NamedTuple):
    """A thing that a registry found.

    Attributes:
        object: the thing.
        name: under which a process with another working directory finds it too.
        source: where it is: "built in", a distribution and its version, a module, or a file.
        digest: SHA-256 of its file; "" where it is not named by its file.
    """

    object: Any
    name: str
    source: str
    digest: str = ""

    @property
    def ours(self) -> bool:
        """It is built in."""
        return self.source == BUILT_IN


class Row(NamedTuple):
    """A line of ``rlfusion list``: a name, where it comes from, what it is."""

    name: str
    source: str
    about: str


@dataclass(frozen=True, eq=False)
class Registry(Mapping[str, Any]):
    """What there is of a kind, and where strangers' own are looked for. As a mapping it is what is built in.

    Attributes:
        what: the kind, in a word: "kernel".
        group: of entry points: "rlfusion.kernels".
        built_in: by short name, "module:Name", which is imported when it is asked for; or the thing itself.
        protocol: what each of them must be: of a class, or of a protocol, whose members it must have.
        adopt: (thing, name) -> what stands for a stranger's thing in this kind.
        also: what else a name may be, for errors.
    """

    what: str
    group: str
    built_in: Mapping[str, Any]
    protocol: type | None = None
    adopt: Callable[[Any, str], Any] | None = None
    also: str = ""

    def __getitem__(self, name: str) -> Any:
        held = self.built_in[name]
        return _attribute(*held.split(":")) if isinstance(held, str) else held

    def __iter__(self) -> Iterator[str]:
        return iter(self.built_in)

    def __len__(self) -> int:
        return len(self.built_in)

    def names(self) -> list[str]:
        """The short names: what is built in, then the entry points."""
        return list(dict.fromkeys([*self.built_in, *(point.name for point in self._points())]))

    def find(self, text: str) -> Found:
        """The thing that ``text`` names, in any case where it is short.

        Raises:
            ConfigError: nothing has that name (the nearest is named), two things have it, or its file or module cannot
                be loaded.
        """
        name = text.strip()
        if ":" in name:
            return self._placed(name)
        ours = [key for key in self.built_in if key.lower() == name.lower()]
        theirs = [point for point in self._points() if point.name.lower() == name.lower()]
        if len(ours) + len(theirs) > 1:
            raise ConfigError(self._ambiguous(name, ours, theirs))
        if ours:
            return Found(self[ours[0]], ours[0], BUILT_IN)
        if theirs:
            return self._from_point(theirs[0])
        raise ConfigError(f"{unknown(self.what, name, self.names())} (or {self._forms(name)})")

    def rows(self) -> Iterator[Row]:
        """A row for each short name; one that cannot be loaded says why."""
        for name in self.names():
            try:
                found = self.find(name)
                yield Row(found.name, found.source, about(found.object))
            except ConfigError as error:
                yield Row(name, "not usable", str(error))

    def _forms(self, name: str) -> str:
        """The other forms of a name; of one that nearly is such a form, what it should be."""
        forms = ", ".join(filter(None, (FORMS, self.also)))
        if name.endswith(".py"):
            return f"{name}:Name, of what is in that file"
        if "." in name and "/" not in name:
            return f"{':'.join(name.rsplit('.', 1))}, if that is a module and a name in it; {forms}"
        return f"{forms}; entry points: {self.group}"

    def _placed(self, name: str) -> Found:
        """What stands in a file or a module."""
        what, (place, _, attribute) = f"{self.what} {name!r}", name.rpartition(":")
        if not place or not attribute:
            raise ConfigError(f"{what}: expected {FORMS}")
        if not self.adopt and (key := next((k for k, held in self.built_in.items() if held == name), "")):
            return Found(self[key], name, BUILT_IN)
        file = place.endswith(".py")
        module, digest = _load_file(what, Path(place)) if file else (_import(what, place), "")
        if attribute not in vars(module):
            raise unknown(f"name in module {place!r}", attribute, [n for n in vars(module) if n[0] != "_"])
        path = str(Path(place).resolve()) if file else ""
        source = path or f"module {place}"
        return self._adopted(vars(module)[attribute], f"{path or place}:{attribute}", source, digest)

    def _points(self) -> list[EntryPoint]:
        return list(_entry_points(_state_of_path()).select(group=self.group))

    def _from_point(self, point: EntryPoint) -> Found:
        with loading(f"{self.what} {point.name!r}"):
            held = point.load()
        return self._adopted(held, point.name, _distribution(point), "")

    def _adopted(self, held: Any, name: str, source: str, digest: str) -> Found:
        """What was found, once it is seen to be one of this kind: nothing is called that a file or a model only names.

        Raises:
            ConfigError: it is something else.
        """
        if self.adopt:
            return Found(self.adopt(held, name), name, source, digest)
        if lacking := _lacking(held, self.protocol):
            said = f"the class {held.__name__}" if inspect.isclass(held) else f"of {type(held).__name__}"
            raise ConfigError(
                f"{self.what} {name!r} is {said}, without {', '.join(lacking)}: expected a class that is a "
                f"{self.protocol.__module__}.{self.protocol.__qualname__} (docs/doors.md)"
            )
        return Found(held, name, source, digest)

    def _ambiguous(self, name: str, ours: list[str], theirs: list[EntryPoint]) -> str:
        candidates = [f"{BUILT_IN} ({held})" for key in ours if isinstance(held := self.built_in[key], str)]
        candidates += [BUILT_IN] if ours and not candidates else []
        candidates += [f"of {_distribution(point)} ({point.value})" for point in theirs]
        return (
            f"{self.what} {name!r} is the name of {len(candidates)} things: {'; '.join(candidates)}: expected the one "
            "that is meant, by the module:Name in its brackets"
        )


def about(held: Any) -> str:
    """The first line of the docstring of a class or a function; "" for none, and for what is neither."""
    told = inspect.getdoc(held) if inspect.isclass(held) or inspect.isroutine(held) else ""
    return (told or "").partition("\n")[0]


def absolute(text: str) -> str:
    """A text that names a thing in a file, with the file's path from the root; any other text as it is."""
    named = PLACED.fullmatch(text)
    return f"{Path(named['file']).resolve()}:{named['rest']}" if named else text


def label(text: str) -> str:
    """A short name of what a text names, for tables and folders: without its place and its settings."""
    name = PLACED.fullmatch(text)["rest"] if PLACED.fullmatch(text) else text
    return name.partition("(")[0].rpartition(":")[2].strip()


def files_of(value: Any) -> dict[str, str]:
    """SHA-256, by path, of every file that is named in ``value``, plain data, as the place of a thing.

    A file that is not there has "absent".
    """
    return {path: _digest(path) for path in _paths(value)}


def texts_of(value: Any) -> dict[str, str]:
    """The text of each such file, by path: what ``receive`` takes."""
    return {path: held.decode("utf-8") for path in _paths(value) if (held := _bytes(Path(path))) is not None}


def receive(texts: Mapping[str, str]) -> None:
    """Take the files of these paths to be these texts, in this process, whatever lies there."""
    _RECEIVED.update({path: text.encode() for path, text in texts.items()})


_RECEIVED: dict[str, bytes] = {}


@contextmanager
def pinned(value: Any) -> Iterator[None]:
    """Within the context the files named in ``value``, plain data, are what they are now, whoever edits them."""
    before = dict(_RECEIVED)
    receive(texts_of(value))
    try:
        yield
    finally:
        _RECEIVED.clear()
        _RECEIVED.update(before)


def found_again(files: Mapping[str, str], what: str) -> dict[str, str]:
    """Where the files of these SHA-256, by path, are now: there, or under their names in the working directory.

    Raises:
        ConfigError: one is nowhere, or was edited; ``what`` says what was made with it.
    """
    places = {}
    for path, digest in files.items():
        tried = [path, str(Path(Path(path).name).resolve())]
        places[path] = next((one for one in tried if _digest(one) == digest), "")
        if not places[path]:
            now = _digest(path)
            state = "is not there" if now == ABSENT else f"was edited since (its SHA-256 is {now[:12]})"
            raise ConfigError(
                f"{what} was made with {path} of SHA-256 {digest[:12]}, which {state}: expected that file as it was, "
                f"there or as {Path(path).name} in the working directory"
            )
    return places


def _paths(value: Any) -> list[str]:
    """The files, with their paths from the root, that texts of nested plain data name."""
    if isinstance(value, str):
        named = PLACED.fullmatch(value)
        return [str(Path(named["file"]).resolve())] if named else []
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return list(dict.fromkeys(path for one in value for path in _paths(one)))
    return []


def _bytes(path: Path) -> bytes | None:
    """What a file holds; None where there is none."""
    held = _RECEIVED.get(str(path.resolve()))
    return held if held is not None else path.read_bytes() if path.is_file() else None


def _digest(path: str) -> str:
    held = _bytes(Path(path))
    return ABSENT if held is None else hashlib.sha256(held).hexdigest()


def _load_file(what: str, path: Path) -> tuple[ModuleType, str]:
    """The module that a file holds, once a process, and its digest; a file that changed is another module."""
    path, held = path.resolve(), _bytes(path)
    if held is None:
        others = near(path.name, (one.name for one in path.parent.glob("*.py")))
        hint = f"; did you mean {others[0]!r}?" if others else ""
        raise ConfigError(f"{what}: no file {str(path)!r} (from the folder {str(Path.cwd())!r}){hint}")
    name = f"rlfusion_file_{path.stem}_{hashlib.sha256(str(path).encode() + held).hexdigest()[:16]}"
    digest = hashlib.sha256(held).hexdigest()
    if name in sys.modules:
        return sys.modules[name], digest
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    try:
        with loading(what):
            exec(compile(held, str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    if not path.is_file():  # received: tracebacks and dataclasses read its source here
        text = held.decode("utf-8")
        linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    return module, digest


def _import(what: str, module: str) -> ModuleType:
    with loading(what):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not error.name or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module was found, something that it needs was not
            raise ConfigError(f"{what}: no module {error.name!r} (is its folder on PYTHONPATH?)") from error


def _attribute(module: str, name: str) -> Any:
    return vars(importlib.import_module(module))[name]


def _state_of_path() -> tuple[tuple[str, int], ...]:
    """The folders that packages are looked for in, and when each last changed."""
    found = ((folder, Path(folder or ".")) for folder in sys.path)
    return tuple((name, folder.stat().st_mtime_ns) for name, folder in found if folder.exists())


@lru_cache(maxsize=4)
def _entry_points(state: object) -> Any:
    """All entry points, read again where a package came or went."""
    return entry_points()


def _distribution(point: EntryPoint) -> str:
    held = point.dist
    return f"{held.name} {held.version}" if held is not None else f"module {point.module}"


def _lacking(held: Any, protocol: type | None) -> list[str]:
    """What a class, or an object, lacks to be of another class, or to have the members of a protocol."""
    if protocol is None:
        return []
    if not getattr(protocol, "_is_protocol", False):
        fine = issubclass(held, protocol) if inspect.isclass(held) else isinstance(held, protocol)
        return [] if fine else [f"the base {protocol.__name__}"]
    bases = held.__mro__ if inspect.isclass(held) else ()
    fields = {name for base in bases for name in vars(base).get("__annotations__", ())}  # without a default, not in dir
    return [name for name in members(protocol) if name not in {*dir(held), *fields}]


def members(protocol: type) -> list[str]:
    """The names of what a protocol asks for."""
    ours = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False) and base is not Protocol]
    held = {name for base in ours for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    return sorted(name for name in held if not name.startswith("_") or name == "__call__")
