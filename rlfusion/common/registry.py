"""One way to name a thing that is one file: an agent, a kernel, a network, a reward, ...

A name is

    short           a row of the table of what is built in, or an entry point of the group, of an installed package
    module:Name     package.module:Name, of anything that Python can import
    file.py:Name    path/to/file.py:Name, of a file that need not be installed

``code_files`` says how the last is told from other texts, written down, found again, and sent to a worker.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from rlfusion.common.code_files import load_file
from rlfusion.common.errors import ConfigError, unknown
from rlfusion.common.user_code import loading

BUILT_IN = "built in"
FORMS = "package.module:name, path/to/file.py:name"


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
        module, digest = load_file(what, Path(place)) if file else (_import(what, place), "")
        if attribute not in vars(module):
            raise unknown(f"name in module {place!r}", attribute, _offered(module))
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
        if missing := lacking(held, self.protocol):
            said = f"the class {held.__name__}" if inspect.isclass(held) else f"of {type(held).__name__}"
            raise ConfigError(
                f"{self.what} {name!r} is {said}, without {', '.join(missing)}: expected a class that is a "
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


def _offered(module: ModuleType) -> list[str]:
    """The names that a module says are its own (``__all__``), or its public ones without what it only imports; all of
    them where that leaves none.
    """
    public = {name: held for name, held in vars(module).items() if name[0] != "_"}
    said = getattr(module, "__all__", ())
    own = [name for name, held in public.items() if name in said and not inspect.ismodule(held)]
    own = own or [name for name, held in public.items() if not _imported(held, module)]
    return own or list(public)


def _imported(held: Any, module: ModuleType) -> bool:
    placed = inspect.isclass(held) or inspect.isroutine(held)
    return inspect.ismodule(held) or (placed and held.__module__ not in (module.__name__, None))


def lacking(held: Any, protocol: type | None) -> list[str]:
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
