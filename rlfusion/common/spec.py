"""Settings as text: a frozen dataclass is written as its repr, ``DDIM(eta=0.5)``, and read back from it.

Only a name and literal keyword arguments are read; nothing is evaluated.
"""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlfusion.common.annotations import fits, refused
from rlfusion.common.errors import ConfigError, shorten, unknown
from rlfusion.common.registry import Found, Registry
from rlfusion.common.user_code import running

LONGEST = 2000
"""Characters of a text that can be one of these; Python's parser takes gigabytes for a text of megabytes."""


def split(text: str) -> tuple[str, dict[str, Any]]:
    """``"DDIM(eta=0.5)"`` -> ``("DDIM", {"eta": 0.5})``; a bare name has no arguments.

    Raises:
        ConfigError: not a name with literal keyword arguments.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{shorten(repr(text))}: {len(text)} characters, expected {FORM}")
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        tree = ast.parse(f"f({rest}", mode="eval").body
        called = isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args
        keys = [k.arg for k in tree.keywords] if called else [None]
        if None in keys or len(set(keys)) < len(keys):
            raise ValueError("not keyword arguments")
        return name, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{shorten(repr(text))}: expected {FORM}{_quoted(rest)}") from error


FORM = "Name or Name(setting=value, ...)"


def _quoted(rest: str) -> str:
    """The advice where a word stands without the quotes of a text."""
    match = re.search(r"(\w+)\s*=\s*([A-Za-z]\w*)\s*[,)]", rest)
    if match is None or match[2].lower() in ("true", "false", "none", "nan", "inf"):
        return ""
    return f"; did you mean {match[1]}={match[2]!r}?"


def lookup(table: Mapping[str, Callable[..., Any]], name: str, what: str) -> Callable[..., Any]:
    """The entry of ``table`` under ``name``, in any case; of a registry also what strangers have.

    Raises:
        ConfigError: no such entry; the nearest one is named.
    """
    if isinstance(table, Registry):
        return table.find(name).object
    known = {key.lower(): key for key in table}
    if name.lower() not in known:
        raise unknown(what, name, table)
    return table[known[name.lower()]]


def parse(text: str, table: Mapping[str, Callable[..., Any]], what: str) -> Any:
    """The object that ``text`` writes, made by its entry in ``table``.

    Raises:
        ConfigError: unknown name or setting (with the nearest one), or a value that the entry refuses.
    """
    name, settings = split(text)
    if isinstance(table, Registry):
        return make(table, table.find(name), settings)
    return call(lookup(table, name, what), settings, f"{what} {name!r}")


def make(registry: Registry, found: Found, settings: Mapping[str, Any]) -> Any:
    """What a thing of a registry makes of its settings; one that makes nothing, being no class or function, is itself.

    Raises:
        ConfigError: as ``call``.
        UserCodeError: a stranger's raises.
    """
    what = f"{registry.what} {found.name!r}"
    if found.ours:
        return call(found.object, settings, what)
    if not inspect.isclass(found.object) and not inspect.isroutine(found.object):
        if settings:
            raise ConfigError(f"{what} has no settings: got {next(iter(settings))!r}")
        return found.object
    with running(what):
        return call(found.object, settings, what)


def call(factory: Callable[..., Any], settings: Mapping[str, Any], what: str) -> Any:
    """``factory`` called with keyword ``settings``, each checked against its signature.

    Raises:
        ConfigError: a setting that the factory does not have, a missing one, a value that is not what its annotation
            says, or one that the factory cannot use.
    """
    signature = signature_of(factory)
    for key in settings:
        if key not in signature.parameters:
            if not signature.parameters:
                raise ConfigError(f"{what} has no settings: got {key!r}")
            raise unknown(f"setting of {what}", key, signature.parameters)
    require_fit(signature.parameters, settings, what)
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}") from error
    try:
        return factory(**settings)
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise ConfigError(f"{what} cannot be made with {shorten(dict(settings))}: {shorten(error, 120)}") from error


def signature_of(factory: Callable[..., Any]) -> inspect.Signature:
    """The signature, with annotations as objects where they can be found."""
    try:
        return inspect.signature(factory, eval_str=True)
    except (NameError, SyntaxError, TypeError, AttributeError):  # annotations that only a type checker can read
        return inspect.signature(factory)


def require_fit(parameters: Mapping[str, inspect.Parameter], settings: Mapping[str, Any], what: str) -> None:
    """Refuse values that are not what the annotations of ``parameters`` say.

    Raises:
        ConfigError: names the setting, its value and what was expected.
    """
    for key, value in settings.items():
        parameter = parameters.get(key)
        annotation = Any if parameter is None or isinstance(parameter.annotation, str) else parameter.annotation
        annotation = Any if annotation is inspect.Parameter.empty else annotation
        if not fits(value, annotation):
            raise ConfigError(refused(key, value, annotation, what))
